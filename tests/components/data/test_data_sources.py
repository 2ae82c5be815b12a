"""Rows from files, folders and names."""

import json

import datasets
import pytest

from nemo_automodel.components.data import load_rows

ROWS = [{"text": f"row {index}"} for index in range(20)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def write(path, rows=ROWS):
    data = datasets.Dataset.from_list(rows)
    match path.suffix:
        case ".jsonl":
            path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8-sig")  # empty lines, byte order mark
        case ".json":
            path.write_text(json.dumps(rows, indent=1))
        case ".parquet":
            data.to_parquet(path)
        case ".csv":
            data.to_csv(path)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_files(tmp_path, suffix):
    path = write(tmp_path / f"rows.{suffix}")
    assert list(load_rows(str(path))) == list(load_rows(path, "train")) == ROWS
    train, validation = load_rows(path, "train[:75%]"), load_rows(path, "train[75%:]")
    assert [*train, *validation] == ROWS
    assert (len(train), validation[-1]) == (15, ROWS[-1])
    with pytest.raises(IndexError):
        validation[5]
    with pytest.raises(ValueError, match="test"):
        load_rows(path, "test")


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "rows.parquet")
    assert list(load_rows("~/rows.parquet")) == ROWS


def test_json_may_be_json_lines(tmp_path):
    path = write(tmp_path / "rows.jsonl").rename(tmp_path / "rows.json")
    assert list(load_rows(path)) == ROWS


def test_rows_of_json_lines_need_not_be_alike(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [{"a": 1}]}\n{"text": "x"}\n')
    assert list(load_rows(path)) == [{"messages": [{"a": 1}]}, {"text": "x"}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{'text': 1}", "not valid JSON"),
        ("[1, 2]", r"expected a JSON object, got \[1, 2\]"),
        ('{"text": "x', "not valid"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "x"}}\n\n{line}\n{{"text": "x"}}\n')
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 3: .*{reason}"):
        load_rows(path)


def test_bad_json_files(tmp_path):
    for text, reason in [("[{}, 3]", "item 1: expected a JSON object"), ("[{},", "not valid JSON")]:
        (tmp_path / "rows.json").write_text(text)
        with pytest.raises(ValueError, match=reason):
            load_rows(tmp_path / "rows.json")
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(ValueError, match="line 1: not valid JSON"):
        load_rows(tmp_path / "rows.jsonl")


def test_folders(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    assert list(load_rows(tmp_path / "one")) == ROWS
    splits = datasets.DatasetDict(train=data, test=data.select(range(5)))
    splits.save_to_disk(tmp_path / "two")
    assert list(load_rows(str(tmp_path / "two"), "test")) == ROWS[:5]
    assert list(load_rows(tmp_path / "two", "train[2:4]")) == ROWS[2:4]
    with pytest.raises(ValueError, match="has the splits train, test: name one"):
        load_rows(tmp_path / "two")
    (tmp_path / "three").mkdir()
    write(tmp_path / "three" / "train.parquet")
    assert list(load_rows(tmp_path / "three")) == ROWS
    write(tmp_path / "three" / "test.parquet", ROWS[:3])
    assert list(load_rows(tmp_path / "three", "test")) == ROWS[:3]
    with pytest.raises(ValueError, match="name one"):
        load_rows(tmp_path / "three")


def test_names_go_to_the_hub_and_paths_do_not(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((*args, kwargs["name"], kwargs["split"]))
        if args[0] == "org/gone":
            raise datasets.exceptions.DatasetNotFoundError("not on the Hub")
        return datasets.Dataset.from_list(ROWS) if kwargs["split"] else {"train": ROWS}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(load_rows("org/name:config", "train[:3]")) == ROWS
    assert list(load_rows("name")) == ROWS
    assert asked == [("org/name", "config", "train[:3]"), ("name", None, None)]
    with pytest.raises(FileNotFoundError, match="no file or folder org/gone, nor a data set"):
        load_rows("org/gone")
    asked.clear()
    for path in ("rows.jsonl", "data/rows.PARQUET", "./rows", "../rows", "/rows", "~/no/rows", "a/b/c", tmp_path / "d"):
        with pytest.raises(FileNotFoundError, match="there is no file or folder"):
            load_rows(path)
    assert asked == []
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(ValueError, match=r"of type \.jsonl, .*got \.txt"):
        load_rows(tmp_path / "rows.txt")

"""``automodel new``: what it finds out, writes and refuses, and that it stays in step with the families."""

import json
import re
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoConfig

from nemo_automodel._transformers import registry
from nemo_automodel.cli import main
from nemo_automodel.config import load_config
from nemo_automodel.onboard.config_fields import NotDense
from nemo_automodel.onboard.describe import Family, describe
from nemo_automodel.onboard.new import entries, read_config
from nemo_automodel.onboard.render import in_repository, stand_alone
from nemo_automodel.onboard.words import account, sentence
from nemo_automodel.onboard.write import Entry, insert, write
from nemo_automodel.recipes.train import TrainConfig
from nemo_automodel.verify import assert_verified

ROOT = Path(__file__).parent.parent.parent
GIVEN: dict[str, dict[str, Any]] = {
    "qwen3": {
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "mistral": {"rms_norm_eps": 1e-5},
}
"""The configs that the families in the repository were written from."""


@pytest.fixture(autouse=True)
def _restore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MODEL_ARCH_MAPPING", OrderedDict(registry.MODEL_ARCH_MAPPING))
    monkeypatch.setattr(registry, "_registered_classes", dict(registry._registered_classes))


@cache
def family(model_type: str) -> Family:
    return describe(AutoConfig.for_model(model_type, **GIVEN.get(model_type, {})), {})


@pytest.fixture
def tiny_qwen3(tmp_path: Path) -> Path:
    """The folder of a small config with everything that is Qwen3's."""
    sizes = {"hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4}
    layers = {"use_sliding_window": True, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
    config = transformers.Qwen3Config(**sizes, **layers, num_key_value_heads=2, head_dim=24, vocab_size=99)
    config.save_pretrained(tmp_path / "given")
    return tmp_path / "given"


# -- in step with the repository -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GIVEN)
def test_the_families_are_what_it_writes(name: str) -> None:
    for path, text in in_repository(family(name), family("llama"), name).items():
        assert (ROOT / path).read_text() == text, path
    for entry in entries(family(name), family("llama"), name):
        assert entry.text in holding(entry), entry.path


def holding(entry: Entry) -> str:
    """The entry's file with the entry as it goes in: `onboard.families` makes rows of the guide anew."""
    text = (ROOT / entry.path).read_text()
    return re.sub(rf"\|[^\n]*{entry.present}[^\n]*\n", entry.text, text) if entry.path.suffix == ".md" else text


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_it_writes_what_was_written_by_hand_before(name: str) -> None:
    folder = Path("nemo_automodel/components/models") / name
    files = in_repository(family(name), family("llama"), name)
    for file in ("__init__.py", "model.py", "state_dict_adapter.py"):
        by_hand, text = (ROOT / folder / file).read_text(), files[folder / file]
        assert text.split('"""\n', 1)[-1] == by_hand.split('"""\n', 1)[-1]  # all but the docstring


def test_entries_go_in_once_and_in_their_place(tmp_path: Path) -> None:
    for entry in entries(family("mistral"), family("llama"), "mistral"):
        whole = holding(entry)
        file = tmp_path / entry.path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(whole.replace(entry.text, ""))
        assert insert(tmp_path, entry) == "one entry added"
        assert sorted(file.read_text().splitlines()) == sorted(whole.splitlines())
        assert insert(tmp_path, entry) == "unchanged"
        file.write_text("nothing like it")
        assert insert(tmp_path, entry).startswith("by hand, no place for it was found: ")
        file.unlink()
        assert insert(tmp_path, entry).startswith("by hand, there is no such file: ")


CLUSTERS = {"kubernetes", "skypilot"}  # no configurations of a training: tests/recipes/test_examples.py reads them
RECIPES = [path for path in sorted((ROOT / "examples").glob("*.yaml")) if path.stem not in CLUSTERS]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_example_recipes_load(path: Path) -> None:
    assert str(load_config(TrainConfig, path, []).output_dir) == f"runs/{path.stem}"


# -- what it finds out -----------------------------------------------------------------------------------------------

COVERED: dict[str, dict[str, str]] = {
    "granite": {
        "attention_scale": "config.attention_multiplier",
        "embedding_multiplier": "config.embedding_multiplier",
        "residual_multiplier": "config.residual_multiplier",
        "logits_multiplier": "1 / config.logits_scaling",
    },
    "olmo2": {
        "qk_norm": '"full"',
        "norms": 'NormSlots(before_attention=None, after_attention="post_attention_layernorm", before_mlp=None, '
        'after_mlp="post_feedforward_layernorm")',
    },
    "arcee": {"mlp": "PlainMLP"},
    "gemma": {"embedding_multiplier": "config.hidden_size**0.5"},
    "seed_oss": {"o_bias": "config.attention_out_bias"},
    "cwm": {
        "layer_types": "tuple(config.layer_types)",
        "qkv_bias": "False",
        "o_bias": "False",
        "sliding_window": "config.sliding_window",
    },
}


@pytest.mark.parametrize("model_type", COVERED)
def test_slots_as_expressions_of_the_config(model_type: str) -> None:
    plain, found = family("llama").slots, family(model_type).slots
    assert {slot: code for slot, code in found.items() if code != plain.get(slot)} == COVERED[model_type]


@pytest.mark.parametrize("model_type", ["granite", "arcee", "hyperclovax"])
def test_a_family_of_slots_alone_is_verified_as_written(model_type: str, tmp_path: Path) -> None:
    found = family(model_type)
    assert found.by_hand() == []
    found.config.save_pretrained(tmp_path)
    write(tmp_path, stand_alone(found, family("llama"), model_type, ""))
    assert_verified(tmp_path / "model.py", config=tmp_path)


NOT_COVERED = {
    "gemma2": {"norm: RMS, times 1 + the weight", "softcap of the scores: config.attn_logit_softcapping"}
    | {
        "MLP: the activation is in config.hidden_activation",
        "after the head: a softcap, config.final_logit_softcapping",
    },
    "glm": {"tensors: model.layers.*.mlp.gate_up_proj.weight", "RoPE: interleaved", "RoPE channels: 8 of 16"},
    "cohere": {"norm: LayerNorm, times the weight", "residual stream: attention and MLP side by side"},
    "smollm3": {"RoPE: half-split, on no head"},
    "ernie4_5": {"RoPE: interleaved", "attention_dropout: not in the config, and read by the common decoder"},
    "seed_oss": {"residual_dropout = 0.1: the common decoder knows 0.0 only"},
    "olmo": {
        "norm: without a weight",
        "attention: queries, keys or values are changed in place (clipped?) (with clip_qkv=0.5)",
    },
    "hyperclovax": set(),
}


@pytest.mark.parametrize("model_type", NOT_COVERED)
def test_what_no_slot_covers_is_listed(model_type: str) -> None:
    found = family(model_type)
    assert set(found.by_hand()) >= NOT_COVERED[model_type]
    assert bool(found.by_hand()) == bool(NOT_COVERED[model_type])
    text = in_repository(found, family("llama"), model_type)[
        Path(f"nemo_automodel/components/models/{model_type}/model.py")
    ]
    compile(text, model_type, "exec")
    assert all(f"# by hand: {line[:60]}" in text for line in NOT_COVERED[model_type])
    assert all(line in account(found, family("llama")) for line in NOT_COVERED[model_type])


def test_rope_that_differs_comes_with_the_reference_to_start_from() -> None:
    for model_type, there in {"glm": True, "gemma3_text": True, "gemma2": False, "llama": False}.items():
        files = {path.name: text for path, text in stand_alone(family(model_type), family("llama"), "x", "").items()}
        assert ("rope_utils.py" in files) is there
        if there:
            names: dict[str, Any] = {}
            exec(files["rope_utils.py"], names)
            assert names["__all__"] == [f"{family(model_type).prefix}RotaryEmbedding", "apply_rotary_pos_emb"]


def test_differences_in_words() -> None:
    assert sentence(family("llama"), family("llama")) == ""
    assert "nothing" in account(family("llama"), family("llama"))
    assert sentence(family("qwen3"), family("qwen2")) == (
        "biases on query, key and value by `attention_bias`; a bias on the attention's output by `attention_bias`; "
        "RMSNorm on every query and key head"
    )


def test_an_unknown_field_is_named_not_guessed(tiny_qwen3: Path) -> None:
    file = tiny_qwen3 / "config.json"
    fields = json.loads(file.read_text()) | {"residual_gain": 0.5}
    fields["rope_parameters"]["swirl"] = 3
    file.write_text(json.dumps(fields))
    _, config, read = read_config(tiny_qwen3)
    lines = describe(config, read).by_hand()
    assert "residual_gain = 0.5: a field that is not known here; transformers' modeling file does not read it" in lines
    assert "rope_parameters.swirl = 3: a field that is not known here" in lines


# -- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("mixtral", r"mixture-of-experts \(num_local_experts=8\)"),
        ("qwen3_moe", r"mixture-of-experts \("),
        ("deepseek_v3", r"mixture-of-experts \(n_routed_experts=256\)"),
        ("jamba", r"mixture-of-experts \(num_experts=16\)"),
        ("llava", r"vision-language .*\(vision_config\)"),
        ("gemma3", r"vision-language .*\((text|vision)_config\)"),
        ("mamba", r"state-space .*\(state_size=16\)"),
        ("mamba2", r"state-space .*\(state_size=128\)"),
        ("bamba", r"state-space .*\(mamba_n_heads=128\)"),
        ("zamba2", r"state-space .*\(layers_block_type='linear_attention'\)"),
        ("t5", r"encoder-decoder \(is_encoder_decoder=True\)"),
        ("gpt2", r"no \.\.\.ForCausalLM class .*\(GPT2LMHeadModel\)"),
        ("nemotron", r"NemotronForCausalLM cannot be built small"),
    ],
)
def test_what_is_not_dense_is_refused_by_the_field_that_shows_it(model_type: str, message: str) -> None:
    with pytest.raises(NotDense, match=message):
        describe(AutoConfig.for_model(model_type), {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "has no model_type"),
        ('{"model_type": "nowhere"}', "transformers cannot read model_type='nowhere', so there is no reference"),
        ('{"model_type": "nowhere", "auto_map": {}}', "it comes with code of its own, which is not run"),
        ('{"model_type": "nowhere", "num_experts": 4}', r"mixture-of-experts \(num_experts=4\)"),
    ],
)
def test_configs_that_cannot_be_read(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["Qwen3", "--out", "x"], "'Qwen3' is no name for a module"),
        (["qwen3", "--out", "x", "--like", "lama"], "--like lama: transformers has no such model type"),
        (["qwen4"], "Qwen3ForCausalLM is there already, in nemo_automodel.components.models.qwen3.model"),
    ],
)
def test_bad_words_are_one_message(
    words: list[str], message: str, tiny_qwen3: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new", *words, "--from", str(tiny_qwen3)]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


# -- a folder of its own ---------------------------------------------------------------------------------------------


def test_a_folder_of_its_own_verifies_and_keeps_edits(tiny_qwen3: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["new", "mine", "--from", str(tiny_qwen3), "--out", str(tmp_path / "mine"), "--quick"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "differs from Llama, covered by a slot of DecoderSpec" in text
    assert "left to do by hand: nothing" in text
    assert {path.name for path in (tmp_path / "mine").glob("*.*")} == {
        "model.py",
        "config.json",
        "test_model.py",
        "README.md",
    }
    assert registry.resolve("Qwen3ForCausalLM").__module__.startswith("verified_mine")  # type: ignore[union-attr]

    model = tmp_path / "mine" / "model.py"
    edited = model.read_text().replace('qk_norm="head"', "qk_norm=None")
    model.write_text(edited)
    (tmp_path / "mine" / "README.md").unlink()
    assert main(words) == 1
    text = capsys.readouterr().out
    assert model.read_text() == edited
    assert {
        line.split()[0]: line.split()[1] for line in text.splitlines() if line.startswith("  ") and ".py" in line
    } == {
        "model.py": "kept:",
        "test_model.py": "unchanged",
    }
    assert "README.md" in text
    assert "q_norm" in text.partition("left to do by hand:")[2]


def test_writing_leaves_what_differs(tmp_path: Path) -> None:
    files = stand_alone(family("qwen3"), family("llama"), "qwen3", "{}\n")
    assert set(write(tmp_path, files).values()) == {"written"}
    (tmp_path / "model.py").write_text("# mine")
    assert write(tmp_path, files)["model.py"].startswith("kept: edited")
    assert (tmp_path / "model.py").read_text() == "# mine"


def test_the_registry_gets_an_implementation_once_it_verifies(
    tiny_qwen3: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    added = entries(family("qwen3"), family("llama"), "qwen3")
    before = {tmp_path / "checkout" / e.path: holding(e).replace(e.text, "") for e in added}
    for file, text in before.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr("nemo_automodel.onboard.new._repository", lambda: tmp_path / "checkout")
    words = ["new", "qwen3", "--from", str(tiny_qwen3), "--quick"]
    write(tmp_path / "checkout", in_repository(family("qwen3"), family("llama"), "qwen3"))
    model = tmp_path / "checkout/nemo_automodel/components/models/qwen3/model.py"
    right = model.read_text()

    model.write_text(right.replace("qkv_bias=config.attention_bias", "qkv_bias=True"))
    assert main(words) == 1
    assert {file: file.read_text() for file in before} == before
    assert "registry.py: by hand: run this again once it verifies" in capsys.readouterr().out
    model.write_text(right)
    assert main(words) == 0
    assert all(entry.text in (tmp_path / "checkout" / entry.path).read_text() for entry in added)


def test_a_folder_that_is_not_finished_registers_nothing() -> None:
    unfinished = stand_alone(family("gemma"), family("llama"), "gemma", "")[Path("model.py")]
    assert '\n# registry.register("GemmaForCausalLM", GemmaForCausalLM, exist_ok=True)\n' in unfinished
    assert "\nregistry" not in unfinished
    assert (
        '\nregistry.register("Qwen3ForCausalLM"'
        in stand_alone(family("qwen3"), family("llama"), "x", "")[Path("model.py")]
    )

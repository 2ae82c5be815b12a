"""docs/models.md is what the registry, the families' code and reports of verify say."""

import re
from pathlib import Path

import pytest

from nemo_automodel.components.models.common.spec import DecoderSpec
from nemo_automodel.onboard import families

ROOT = Path(__file__).parents[2]
PAGE = ROOT / families.PAGE


def test_the_guide_is_what_the_registry_and_the_code_say():
    page = PAGE.read_text()
    assert families.written(page) == page, "python -m nemo_automodel.onboard.families"


def test_every_family_of_the_guide_is_verified_and_known_for_something():
    pinned = re.search(r"^transformers==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    for line in PAGE.read_text().splitlines():
        if line.startswith("| ["):
            row = dict(zip(families.COLUMNS, line[2:-2].split(" | "), strict=True))
            assert row["known checkpoints"], line
            verified = dict(part.split(": ") for part in row[families.VERIFIED].split("; "))
            assert verified.keys() >= {"5.17.0", pinned[1]}, line
            for version, counts in verified.items():
                # what failed is a difference between transformers' versions, and one of the limits
                assert "failed" not in counts or version.rpartition(".")[0] in row["limits"], line


def test_reports_are_counted_by_family_and_version():
    report = {
        "implementation": "nemo_automodel.components.models.llama.model.LlamaForCausalLM",
        "versions": {"transformers": "5.99.0"},
        "results": [{"outcome": {"passed": passed}} for passed in (True, None, True, False)],
    }
    before, after = (
        {line.split("]")[0]: line for line in page.splitlines()}
        for page in (PAGE.read_text(), families.written(PAGE.read_text(), [report, report]))
    )
    assert [key for key in before if before[key] != after[key]] == ["| [llama"]
    assert "; 5.99.0: 4 passed, 2 failed, 2 n/a |" in after["| [llama"]
    with pytest.raises(ValueError, match=r"docs/models.md has no table with the columns family, known"):
        families.written("# Families")


def test_a_slot_without_words_is_named():
    class Model:
        adapter_class = object

        @staticmethod
        def decoder_spec(config):
            return DecoderSpec(norm_eps=1.0, layer_types=(), norm=NormSpec(weightless=config.plain))  # noqa: F821

    with pytest.raises(ValueError, match=r"norm\.weightless=config\.plain: say in .*families what that is"):
        families.features(Model)

"""By default a family's own test takes its first config; the others belong to the longer suites."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if getattr(item, "originalname", "") == "test_equals_transformers":
            first = next(iter(item.module.CONFIGS))  # type: ignore[attr-defined]
            if item.callspec.params["name"] != first:  # type: ignore[attr-defined]
                item.add_marker(pytest.mark.slow)

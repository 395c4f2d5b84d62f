"""Adapters that are refused: one clear error each, naming the field or file, the value and the limit."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.engine.errors import AdapterError, AdapterIncompatible, AdapterNotFound
from loramux.engine.types import LoraSite
from loramux.resolvers.inspect import inspect_adapter
from tests.adapter_files import (
    CONFIG_FILE,
    peft_config,
    safetensors_bytes,
    with_header,
    write_adapter,
    write_folder,
)
from tests.resolvers.bad_adapters import ALL, GOOD, MODULES, SITES, Bad
from tests.resolvers.bad_tables import TABLES


@pytest.mark.parametrize("bad", [*ALL, *TABLES], ids=lambda bad: bad.name)
def test_a_bad_adapter_gets_one_error_that_says_what_is_wrong(bad: Bad, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    bad.make(folder)

    with pytest.raises(AdapterError) as caught:
        inspect_adapter(folder, bad.sites, max_lora_rank=64)

    assert type(caught.value) is bad.error
    assert caught.value.param
    assert len(caught.value.message) < 900
    for fragment in bad.says:
        assert fragment in caught.value.message


def test_the_good_adapter_that_all_these_are_made_from_is_accepted(tmp_path: Path) -> None:
    spec = inspect_adapter(write_folder(tmp_path, peft_config(), GOOD), SITES, max_lora_rank=64)

    assert len(spec.modules) == len(MODULES)


@pytest.mark.parametrize("name", ["a file", "\0", "x" * 5000])
def test_a_path_that_is_no_folder_is_not_found(name: str, tmp_path: Path) -> None:
    (tmp_path / "a file").touch()

    with pytest.raises(AdapterNotFound, match="No adapter found for"):
        inspect_adapter(tmp_path / name, SITES, max_lora_rank=64)


def test_a_base_model_without_lora_says_so(tmp_path: Path) -> None:
    with pytest.raises(AdapterIncompatible, match="--enable-lora"):
        inspect_adapter(write_adapter(tmp_path, SITES), {}, max_lora_rank=64)


def test_an_endless_regular_expression_is_given_up(tmp_path: Path) -> None:
    sites = {"a" * 60 + ".q_proj": LoraSite(4, 4)}
    folder = write_adapter(tmp_path, sites)
    (folder / CONFIG_FILE).write_text(json.dumps(peft_config(target_modules="(a+)+$")))

    with pytest.raises(AdapterIncompatible, match=r"target_modules .* takes too long"):
        inspect_adapter(folder, sites, max_lora_rank=64)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        *peft_config(),
        "use_rslora",
        "layers_to_transform",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "trainable_token_indices",
        "ensure_weight_tying",
    ]
)


@settings(max_examples=150, deadline=None)
@given(fields=st.dictionaries(FIELDS, JSON, max_size=3))
def test_no_config_raises_anything_but_an_adapter_error(
    fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = write_folder(tmp_path_factory.getbasetemp() / "any-config", peft_config(**fields), GOOD)

    inspect_or_refuse(folder)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_bytes_raise_anything_but_an_adapter_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    good = safetensors_bytes(GOOD)
    header = st.dictionaries(st.sampled_from([*GOOD, "__metadata__"]), JSON, max_size=3)
    start = data.draw(st.integers(0, 400))
    mutated = st.binary(max_size=6).map(lambda new: good[:start] + new + good[start + len(new) :])
    weights = data.draw(st.binary(max_size=40) | header.map(with_header) | mutated)
    folder = write_folder(tmp_path_factory.getbasetemp() / "any-bytes", peft_config(), weights)

    inspect_or_refuse(folder)


def inspect_or_refuse(folder: Path) -> None:
    with contextlib.suppress(AdapterError):
        inspect_adapter(folder, SITES, max_lora_rank=64)

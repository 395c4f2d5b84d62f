"""`loramux fetch` and `loramux doctor`, as a person runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loramux.server.cli import main
from tests.adapter_files import llama_sites, random_tensors, write_adapter, write_folder

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A base model's folder, of which only the config is ever read."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(_LLAMA))
    return str(folder)


def test_doctor_finds_nothing_wrong(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = write_adapter(tmp_path / "a", llama_sites())

    assert main(["doctor", str(adapter), "--model", model]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "can be served"
    assert "trained on    tiny" in lines
    assert "tensors       8: 8 fit, 0 do not" in lines


def test_doctor_says_which_flag_would_help(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tmp_path / "a", llama_sites(), rank=64)

    limit = main(["doctor", str(adapter), "--model", model, "--max-lora-rank=16"])
    first = capsys.readouterr().out
    pool = main(["doctor", str(adapter), "--model", model, "--num-lanes=8"])
    second = capsys.readouterr().out

    assert (limit, pool) == (1, 1)
    assert "--max-lora-rank 64" in first
    assert "--num-lanes" in second


def test_doctor_counts_what_fits_and_shows_what_does_not(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sites = {f"visual.{name}": site for name, site in llama_sites(1).items() if name.endswith("q_proj")}
    sites |= {name: site for name, site in llama_sites().items() if name.endswith("q_proj")}
    adapter = write_adapter(tmp_path / "a", llama_sites(), base_model_name_or_path="org/other")
    write_folder(adapter, None, random_tensors(sites))

    assert main(["doctor", str(adapter), "--model", model, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["can_be_served"], report["num_matched"], report["num_unmatched"]) == (False, 4, 2)
    assert report["unmatched"][0].startswith("base_model.model.visual.")
    assert "org/other" in report["warnings"][0]


def test_doctor_reads_headers_only(tmp_path: Path, model: str) -> None:
    adapter = write_adapter(tmp_path / "a", llama_sites())
    weights = adapter / "adapter_model.safetensors"
    size = weights.stat().st_size
    with weights.open("r+b") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
        file.truncate(header)
        file.truncate(size)  # a hole where the tensors were

    assert main(["doctor", str(adapter), "--model", model]) == 0


@pytest.mark.parametrize(
    ("words", "code", "fragment"),
    [
        (["doctor", "{tmp}/none", "--model", "{model}"], 1, "No adapter found"),
        (["doctor", "ftp://x", "--model", "{model}"], 2, "unknown scheme"),
        (["doctor", "{tmp}", "--model", "{tmp}/none"], 2, "none"),
        (["doctor", "{tmp}"], 2, "--model"),
        (["fetch"], 2, "URI"),
        (["fetch", "{tmp}/none", "--adapter-store-dir={tmp}/store"], 1, "No adapter found"),
        (["fetch", "hf://org/x", "--offline", "--adapter-store-dir={tmp}/store"], 1, "offline"),
    ],
)
def test_commands_that_cannot_be_done(
    tmp_path: Path, model: str, words: list[str], code: int, fragment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(tmp=tmp_path, model=model) for word in words]) == code
    assert fragment in capsys.readouterr().err


def test_fetch_fills_the_store_and_prints_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAMUX_ADAPTER_STORE_DIR", str(tmp_path / "store"))
    a = write_adapter(tmp_path / "a", llama_sites())
    b = write_adapter(tmp_path / "b", llama_sites(), seed=1)

    assert main(["fetch", str(a), str(b), str(tmp_path / "none")]) == 1

    printed = capsys.readouterr()
    rows = [line.split("\t") for line in printed.out.splitlines()]
    assert [row[0] for row in rows] == [a.as_uri(), b.as_uri()]
    for _, digest, folder in rows:
        assert Path(folder) == tmp_path / "store" / "cache" / digest
        assert (Path(folder) / "adapter_model.safetensors").is_file()
    assert "none" in printed.err
    assert list((tmp_path / "store" / "sessions").iterdir()) == []

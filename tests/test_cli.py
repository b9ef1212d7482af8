"""The command line is the package's functions: same names, same defaults, errors in one line."""

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import miracle_hub
from miracle_hub import cli
from tests.limits import HANG_SECONDS

IN_PYTHON = ("options", "model")  # what only functions can be given
VERBS = ("compress", "decompress", "fit", "inspect", "verify", "push", "compare", "certify")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {"first.weight": torch.randn(64, 48, generator=generator), "norm.weight": torch.ones(48)}
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}')
    return tmp_path / "model"


def test_the_verbs_are_those_of_the_package() -> None:
    names = [command.callback.__name__ for command in cli.app.registered_commands if command.callback]
    assert tuple(names) == VERBS and set(VERBS) < set(miracle_hub.__all__)


@pytest.mark.parametrize("verb", VERBS)
def test_options_have_the_names_order_and_defaults_of_the_function(verb: str) -> None:
    def defaults(function: Callable[..., object]) -> list[tuple[str, object]]:
        found = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in found if p.name not in IN_PYTHON]

    assert defaults(getattr(cli, verb)) == defaults(getattr(miracle_hub, verb))


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_every_option(verb: str) -> None:
    shown = CliRunner().invoke(cli.app, [verb, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert shown.exit_code == 0
    for parameter in inspect.signature(getattr(miracle_hub, verb)).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.name not in IN_PYTHON:
            assert "--" + parameter.name.replace("_", "-") in shown.output


def test_a_model_goes_through_all_three_verbs(run: Run, model: Path, tmp_path: Path) -> None:
    small, dense = tmp_path / "small", tmp_path / "dense"
    status, out, _ = run("compress", model, small, "--size", "1.4kB", "--window-bits", 8, "--no-progress")
    n_bytes = (small / "model.safetensors").stat().st_size
    digest = json.loads((small / "config.json").read_text())["quantization_config"]["digest"]
    assert status == 0 and 0.99 * 1400 < n_bytes <= 1400
    dense_bytes = (model / "model.safetensors").stat().st_size
    smaller = f"{dense_bytes / n_bytes:.2f} times smaller"
    assert out.startswith(f"{small}: {dense_bytes:,} → {n_bytes:,} bytes ({smaller}), ")
    assert f"{8 * n_bytes / 3120:.4f} bits per weight" in out and out.endswith(f"digest {digest}\n")
    status, out, _ = run("inspect", small)
    assert (
        status == 0 and f"{n_bytes:,} bytes, 3,120 weights, {8 * n_bytes / 3120:.4f} bits per weight" in out
    )
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "64 × 48" in rows["first.weight"] and re.search(r"8,\d,\d .* 16 ", rows["first.weight"])
    assert "plain: stored plainly, narrowed from F32 to F16" in rows["norm.weight"] and digest in out
    status, out, _ = run("decompress", small, dense, "--no-progress")
    assert (status, out) == (0, f"{dense}: {(dense / 'model.safetensors').stat().st_size:,} bytes\n")
    decoded = miracle_hub.load_state_dict(small)
    written = load_file(dense / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in decoded.items())


def test_verify_has_a_line_for_every_file_and_says_in_its_status_whether_all_is_sound(
    run: Run, model: Path, tmp_path: Path
) -> None:
    small, path = tmp_path / "small", tmp_path / "small" / "model.safetensors"
    miracle_hub.compress(model, small, size="1.4kB", window_bits=8, progress=False)
    digest, data = miracle_hub.inspect(small).digest, bytearray(path.read_bytes())
    status, out, err = run("verify", small, "--dense", model)
    assert (status, err) == (0, "") and out.endswith(f"{small}: every byte agrees\ndigest {digest}\n")
    line = rf"{path.name}: {len(data):,} bytes, sha256 \w{{16}}…, 1 decoded, digest agrees, 1 plain, finite"
    assert re.search(line, out) and out.count("\n") == 5  # README.md and config.json too
    data[-1] ^= 1
    path.write_bytes(data)
    status, out, err = run("verify", small)
    assert status == 1 and "model.safetensors: " in out and "WRONG: first.weight: " in out
    assert err.startswith(f"miracle: {small}: not sound: first.weight: ") and err.count("\n") == 1


def test_the_command_line_writes_what_the_function_writes(run: Run, model: Path, tmp_path: Path) -> None:
    excluded = ("--modules-to-not-convert", "norm", "--modules-to-not-convert", "norm.weight")
    options = ("--bits-per-weight", 4, "--window-bits", 8, "--seed", 7, "--rotation", 4, "--no-progress")
    run("compress", model, tmp_path / "a", *options, *excluded)
    miracle_hub.compress(
        model, tmp_path / "b", bits_per_weight=4, window_bits=8, seed=7, rotation=4,
        modules_to_not_convert=["norm", "norm.weight"], progress=False,
    )  # fmt: skip
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compress", "{empty}", "{out}", "--size", "1kB"), "expected model.safetensors or"),
        (("compress", "{model}", "{out}"), "expected either bits_per_weight or size, found neither"),
        (("compress", "{model}", "{out}", "--size", "9B"), "the least possible is"),
        (("compress", "{model}", "{out}", "--size", "big"), "expected a positive number of bytes such as"),
        (("compress", "{model}", "{out}", "--size", "1kB", "--window-bits", "30"), "window_bits: expected 8"),
        (("compress", "{model}", "{empty}", "--size", "1400"), "the output folder exists"),
        (("compress", "{model}", "{model}/out", "--size", "1400"), "apart from the source"),
        (("decompress", "{empty}", "{out}"), "expected model.safetensors or"),
        (("decompress", "{model}", "{empty}"), "the output folder exists"),
        (("inspect", "{empty}"), "expected model.safetensors or"),
        (("certify", "{model}", "--data", "d.tsv", "--fitted"), "expected a compressed repository"),
        (("verify", "{empty}"), "not sound: {empty}: expected model.safetensors or"),
        (("push", "{empty}", "user/name"), "expected model.safetensors or"),
        (("push", "{model}", "user/name"), "expected a compressed folder, found one without any payload"),
        (("compare", "{empty}", "{empty}", "--data", "d.txt"), "expected model.safetensors or"),
    ],
)
def test_an_error_is_one_line_on_standard_error_with_status_1(
    arguments: tuple[str, ...], message: str, run: Run, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"empty": tmp_path / "empty", "out": tmp_path / "out", "model": model}
    status, out, err = run(*(argument.format(**places) for argument in arguments))
    assert status == 1 and out == ""
    assert (
        err.startswith("miracle: ")
        and message.format(**places) in err
        and err.count("\n") == 1
        and err.endswith("\n")
    )
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_is_refused_by_the_parser(run: Run, model: Path, tmp_path: Path) -> None:
    status, _, err = run("compress", model, tmp_path / "out", "--bits", "2")
    assert status == 2 and "--bits" in err


def test_progress_is_shown_on_standard_error_only(run: Run, model: Path, tmp_path: Path) -> None:
    _, out, err = run("compress", model, tmp_path / "a", "--size", "1400", "--window-bits", 8)
    assert "compress: 100%" in err and "weights/s" in err and "%|" not in out
    _, _, err = run("decompress", tmp_path / "a", tmp_path / "b", "--no-progress")
    assert err == ""


def test_the_installed_script_runs_and_fails_the_same_way(tmp_path: Path) -> None:
    script = Path(sys.executable).parent / "miracle"
    done = subprocess.run([script, "inspect", tmp_path], capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"miracle: {tmp_path}: expected model.safetensors")

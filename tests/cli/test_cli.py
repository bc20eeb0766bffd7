"""The `masksolve` command: what it prints, its exit codes, and that a failure leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import masksolve
from masksolve import cli
from masksolve.checkpoint import prune_checkpoint
from tests import processes
from tests.checkpoints import contents, write_sharded
from tests.cli.conftest import Run
from tests.processes import let_interrupts_through


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint with every kind of tensor, negative ones and -0.0 among the weights."""
    rng = np.random.default_rng(0)
    path = tmp_path / "in.safetensors"
    save_file(
        {
            "layer.weight": rng.standard_normal((24, 16)).astype(np.float32),
            "layer.half": rng.standard_normal((16, 8)).astype(np.float16),
            "layer.double": rng.standard_normal((9, 13)),
            "conv.weight": rng.standard_normal((8, 16, 3, 3)).astype(np.float32),
            "tokens.embedding": rng.standard_normal((50, 8)).astype(np.float32),
            "layer.bias": rng.standard_normal(24).astype(np.float32),
            "layer.tiny": rng.standard_normal((2, 16)).astype(np.float32),
            "step": np.array(7),
            "ids": np.arange(64).reshape(8, 8),
            "empty": np.zeros((0, 8), np.float32),
        },
        path,
        metadata={"format": "pt", "note": "kept"},
    )
    return path


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def header_of(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


PRUNED = {"layer.weight", "layer.half", "layer.double", "conv.weight"}


def test_prune_makes_every_weight_matrix_transposable_and_optimal(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    code, out, err = run("prune", checkpoint, "--pattern", "3:8", "--output", output)
    assert code == 0
    before, after = tensors_of(checkpoint), tensors_of(output)
    for name in PRUNED:
        w, pruned = before[name], after[name]
        if w.ndim > 2:
            w, pruned = np.moveaxis(w, (0, 1), (-2, -1)), np.moveaxis(pruned, (0, 1), (-2, -1))
        assert masksolve.certify(w, pruned != 0, 3, 8).optimal
        assert (w[pruned != 0] == pruned[pruned != 0]).all()
        assert f"pruned {name}" in err
        assert name in out
    assert "every tile proven optimal" in out


def test_prune_keeps_all_other_bytes(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    run("prune", checkpoint, "--pattern", "2:4", "--output", output)
    assert header_of(output) == header_of(checkpoint)
    assert output.stat().st_size == checkpoint.stat().st_size
    before, after = tensors_of(checkpoint), tensors_of(output)
    for name in before.keys() - PRUNED - {"layer.tiny"}:
        assert before[name].tobytes() == after[name].tobytes()


def test_pruned_weights_are_positive_zeros(run: Run, tmp_path: Path) -> None:
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({"w": -np.abs(np.random.default_rng(1).standard_normal((8, 8)))}, source)
    assert run("prune", source, "--pattern", "1:4", "--output", output)[0] == 0
    pruned = tensors_of(output)["w"]
    assert (pruned == 0).sum() == 48
    assert not np.signbit(pruned[pruned == 0]).any()


def test_prune_reads_and_writes_bfloat16(run: Run, tmp_path: Path) -> None:
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    w = np.random.default_rng(2).standard_normal((16, 16)).astype(ml_dtypes.bfloat16)
    header = json.dumps({"w": {"dtype": "BF16", "shape": [16, 16], "data_offsets": [0, 512]}}).encode()
    source.write_bytes(len(header).to_bytes(8, "little") + header + w.tobytes())
    assert run("prune", source, "--pattern", "3:8", "--output", output)[0] == 0
    content = output.read_bytes()
    pruned = np.frombuffer(content[-512:], ml_dtypes.bfloat16).reshape(16, 16)
    assert content[:-512] == source.read_bytes()[:-512]
    assert masksolve.certify(w, pruned != 0, 3, 8).optimal


def test_skipped_tensors_are_named_with_the_reason(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    run(
        *("prune", checkpoint, "--pattern", "4:8", "--output", tmp_path / "out.safetensors", "--report", report),
        *("--exclude", "conv.*", "--exclude", "layer.h*"),
    )
    record = json.loads(report.read_text())
    reasons = {tensor["name"]: tensor["reason"] for tensor in record["skipped"]}
    assert {tensor["name"] for tensor in record["tensors"]} == {"layer.weight", "layer.double"}
    assert reasons["tokens.embedding"] == "an embedding by its name; include it to prune it"
    assert reasons["conv.weight"] == "excluded by 'conv.*'"
    assert reasons["layer.bias"] == "1-D: not a matrix"
    assert reasons["layer.tiny"] == "2x16 holds no whole 8x8 tile"
    assert reasons["ids"] == "dtype I64 is not one of F64, F32, F16, BF16"
    assert reasons["empty"] == "has no entries"


def test_the_report_repeats_what_the_certificates_say(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    report, output = tmp_path / "report.json", tmp_path / "out.safetensors"
    run("prune", checkpoint, "--pattern", "4:8", "--method", "greedy", "--output", output, "--report", report)
    record = json.loads(report.read_text())
    assert record["pattern"] == "4:8"
    assert record["method"] == "greedy"
    assert record["masksolve_version"] == masksolve.__version__
    entry = next(tensor for tensor in record["tensors"] if tensor["name"] == "layer.weight")
    w = tensors_of(checkpoint)["layer.weight"]
    certificate = masksolve.certify(w, tensors_of(output)["layer.weight"] != 0, 4, 8)
    assert entry["kept"] == pytest.approx(certificate.kept, rel=1e-12)
    assert entry["gap"] == pytest.approx(certificate.gap, rel=1e-9)
    assert entry["kept_importance"] == pytest.approx(certificate.kept / np.abs(w.astype(float)).sum())
    assert record["optimal"] is False


def test_include_takes_embeddings_and_nothing_else(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    run(
        *("prune", checkpoint, "--pattern", "4:8", "--include", "tokens.*"),
        *("--output", tmp_path / "out.safetensors", "--report", report),
    )
    assert [tensor["name"] for tensor in json.loads(report.read_text())["tensors"]] == ["tokens.embedding"]


def test_check_accepts_what_prune_wrote_and_refuses_the_input(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    run("prune", checkpoint, "--pattern", "4:8", "--output", output)
    assert run("check", output, "--pattern", "4:8")[0] == 0
    assert run("check", output, "--pattern", "5:8")[0] == 0
    code, out, _ = run("check", output, "--pattern", "3:8")
    assert code == 1
    assert "4 of 4 tensors are not" in out
    assert out.endswith(
        "if a prune left them dense, --record with its JSON report checks what it pruned, and no others\n"
    )
    code, out, _ = run("check", checkpoint, "--pattern", "4:8")
    assert code == 1
    assert "BAD layer.weight  mask[0, 0:8] keeps 8 of 8 entries; 4:8 along rows allows at most 4" in out


def test_methods_lists_every_method(run: Run) -> None:
    code, out, _ = run("methods")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [
        "exact",
        "flow",
        "lp",
        "enumerate",
        "greedy",
        "two-approx",
    ]


def test_methods_says_how_to_install_what_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "available_methods", lambda: ("exact", "enumerate", "greedy", "two-approx"))
    assert "flow         pip install 'masksolve[flow]'\nlp           pip install 'masksolve[lp]'" in run("methods")[1]


def test_a_terminal_sees_a_progress_bar(checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "masksolve", "prune", checkpoint, "--pattern", "4:8", "--output"]
    typescript = subprocess.run(
        ["script", "-qec", " ".join(map(str, [*command, tmp_path / "out.safetensors"])), "/dev/null"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "150"},
    ).stdout
    assert "pruning" in typescript
    assert "kB/s" in typescript or "KiB" in typescript
    assert "0 (optimal)" in typescript


BAD_USAGE = {
    "pattern out of range": (["--pattern", "9:8"], "n must lie between 0 and m=8, got n=9"),
    "pattern not N:M": (["--pattern", "half"], "got 'half'"),
    "unknown method": (["--method", "exakt"], "'--method': 'exakt' is not one of 'exact', 'flow'"),
    "unknown direction": (["--direction", "row"], "'--direction': 'row' is not one of 'both', 'rows', 'columns'"),
    "no address of a scheduler": (["--scheduler", "foo://x:1"], "'foo://x:1' is not the address of a scheduler"),
    "too large for the method": (["--method", "enumerate"], "116,963,796,250 masks"),
    "glob that matches nothing": (["--include", "nope*"], "--include 'nope*' matches none of the 10 tensor names"),
    "pattern that nothing fits": (["--pattern", "32:64"], "no tensor fits pattern 32:64"),
    "two patterns": (["--pattern", "2:4", "--pattern", "4:8"], "--pattern is given as 2:4 and 4:8; give one"),
    "one and some by layer": (
        ["--pattern", "2:4", "--pattern", "w=4:8"],
        "given as 2:4 and w=4:8; give one; the pattern of all other weights is '*=N:M'",
    ),
    "a glob twice": (["--pattern", "w=2:4", "--pattern", "w=4:8"], "--pattern is given twice for 'w'"),
    "a layer's pattern that is none": (["--pattern", "w=4"], 'a pattern is written "N:M"'),
    "no file of patterns": (["--pattern", "none.toml"], "none.toml cannot be read: No such file"),
    "unknown option": (["--colour"], "No such option"),
}


@pytest.mark.parametrize("case", BAD_USAGE)
def test_bad_usage_gets_one_line_and_writes_nothing(case: str, run: Run, checkpoint: Path, tmp_path: Path) -> None:
    options, message = BAD_USAGE[case]
    before = sorted(tmp_path.iterdir())
    pattern = [] if "--pattern" in options else ["--pattern", "4:8"]
    code, out, err = run("prune", checkpoint, *pattern, "--output", tmp_path / "out.safetensors", *options)
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    for part in message.split(".*"):
        assert part in err
    assert sorted(tmp_path.iterdir()) == before


def bad_inputs(good: bytes) -> dict[str, tuple[bytes | None, str]]:
    return {
        "missing": (None, "does not exist"),
        "empty": (b"", "is not a whole safetensors file"),
        "truncated": (good[:-1], "is not a whole safetensors file"),
        "truncated header": (good[:20], "is not a whole safetensors file"),
        "another format": (b"PK\x03\x04" + good[4:], "is not a whole safetensors file"),
    }


@pytest.mark.parametrize("case", bad_inputs(b""))
@pytest.mark.parametrize("command", ["prune", "check"])
def test_a_bad_input_file_is_refused(case: str, command: str, run: Run, checkpoint: Path, tmp_path: Path) -> None:
    content, message = bad_inputs(checkpoint.read_bytes())[case]
    bad = tmp_path / "bad.safetensors"
    if content is not None:
        bad.write_bytes(content)
    output = tmp_path / "out.safetensors"
    code, _, err = run(command, bad, "--pattern", "4:8", *(["--output", output] if command == "prune" else []))
    assert code == 2
    assert f"{bad} {message}" in err
    assert len(err.splitlines()) == 1
    assert not output.exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [(3, 4), (17, 15)])
def test_a_weight_that_is_not_finite_is_named(
    value: float, position: tuple[int, int], run: Run, tmp_path: Path
) -> None:
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    w = np.ones((20, 16), np.float32)
    w[position] = value
    save_file({"fine": np.ones((8, 8)), "layer.weight": w}, source)
    code, _, err = run("prune", source, "--pattern", "4:8", "--output", output)
    assert code == 2
    assert f"tensor 'layer.weight': weights[{position[0]}, {position[1]}] is {value}" in err
    assert sorted(tmp_path.iterdir()) == [source]


def test_an_output_that_exists_is_replaced_only_when_asked(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    output.write_text("precious")
    arguments = ["prune", checkpoint, "--pattern", "4:8", "--output", output]
    code, _, err = run(*arguments)
    assert code == 2
    assert f"{output} exists" in err
    assert "--overwrite" in err
    assert output.read_text() == "precious"
    assert run(*arguments, "--overwrite")[0] == 0
    assert run("check", output, "--pattern", "4:8")[0] == 0


def test_the_input_is_never_the_output(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    content = checkpoint.read_bytes()
    link = tmp_path / "link.safetensors"
    link.symlink_to(checkpoint)
    for output in (checkpoint, link):
        code, _, err = run("prune", checkpoint, "--pattern", "4:8", "--output", output, "--overwrite")
        assert code == 2
        assert f"the output {output} is the input" in err
    assert checkpoint.read_bytes() == content


def test_a_missing_output_folder_is_named(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    code, _, err = run("prune", checkpoint, "--pattern", "4:8", "--output", tmp_path / "no" / "out.safetensors")
    assert code == 2
    assert f"{tmp_path / 'no'} does not exist" in err


def test_an_unwritable_folder_is_named(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sealed"
    folder.mkdir()
    # Root may write anywhere, whatever the folder's mode.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder)
    code, _, err = run("prune", checkpoint, "--pattern", "4:8", "--output", folder / "out.safetensors")
    assert code == 2
    assert f"{folder} is not writable" in err
    assert not list(folder.iterdir())


def test_a_report_that_cannot_be_written_stops_the_prune_before_it_starts(
    run: Run, checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.safetensors"
    bad = {
        tmp_path / "no" / "r.json": "does not exist",
        checkpoint: "is the input or the output",
        tmp_path: "is a folder",
    }
    for report, message in bad.items():
        arguments = ["--pattern", "4:8", "--output", output, "--report", report, "--overwrite"]
        code, _, err = run("prune", checkpoint, *arguments)
        assert code == 2
        assert message in err
        assert not output.exists()


def test_a_report_replaces_no_file_of_the_input(run: Run, tmp_path: Path) -> None:
    source = write_sharded(tmp_path / "in")
    before = contents(source)
    names = [name for name in before if Path(name).suffix == ".json"]
    for name in (*names, "new.json"):
        arguments = ["--pattern", "4:8", "--output", tmp_path / "out", "--report", source / name, "--overwrite"]
        code, _, err = run("prune", source, *arguments)
        assert code == 2
        assert f"{name} lies in the input; name a file elsewhere" in err
    assert contents(source) == before
    assert names


@processes.POSIX
def test_a_report_takes_the_place_of_a_link_to_itself(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    circle = tmp_path / "circle.html"
    circle.symlink_to(circle.name)
    output = tmp_path / "out.safetensors"
    assert run("prune", checkpoint, "--pattern", "4:8", "--output", output, "--report", circle)[0] == 0
    assert circle.read_text().startswith("<!doctype html>")


def test_importance_beyond_float64_is_null_in_the_report(run: Run, tmp_path: Path) -> None:
    save_file({"w": np.full((8, 8), 1.5e308)}, tmp_path / "in.safetensors")
    report = tmp_path / "report.json"
    arguments = ["--pattern", "4:8", "--output", tmp_path / "out.safetensors", "--report", report]
    assert run("prune", tmp_path / "in.safetensors", *arguments)[0] == 0

    def refused(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads(report.read_text(), parse_constant=refused)
    assert found["tensors"][0]["importance"] is None


def command_in_process(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "masksolve", *map(str, arguments)]


@processes.POSIX
def test_a_full_disk_leaves_nothing_behind(checkpoint: Path, tmp_path: Path) -> None:
    import resource

    def limit_file_size() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    output = tmp_path / "out.safetensors"
    done = subprocess.run(
        command_in_process("prune", checkpoint, "--pattern", "4:8", "--output", output),
        capture_output=True,
        text=True,
        preexec_fn=limit_file_size,
        check=False,
    )
    assert done.returncode == 2
    assert "File too large" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == [checkpoint]


@processes.POSIX
@pytest.mark.parametrize("how", ["SIGKILL", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_killed_prune_leaves_no_half_written_output(how: str, tmp_path: Path) -> None:
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({f"w{i}": np.ones((64, 64), np.float32) for i in range(8)}, source)
    command = command_in_process("prune", source, "--pattern", "4:8", "--method", "lp", "--output", output)
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=let_interrupts_through,
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("pruned")
    process.send_signal(signal.Signals[how])
    process.wait(timeout=60)
    process.stderr.close()
    assert process.returncode == (-signal.SIGKILL if how == "SIGKILL" else 130)
    assert not output.exists()
    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert resumed.returncode == 0
    assert sorted(tmp_path.iterdir()) == [source, output]


@processes.LINUX
def test_a_folder_that_cannot_be_written_is_named(run: Run, checkpoint: Path) -> None:
    # Nobody may write there, not even root.
    code, _, err = run("prune", checkpoint, "--pattern", "4:8", "--output", "/proc/out.safetensors")
    assert code == 2
    assert "/proc" in err
    assert len(err.splitlines()) == 1


def test_masks_are_stored_and_applied(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    masks, output, applied = (tmp_path / f"{name}.safetensors" for name in ("masks", "out", "applied"))
    assert run("prune", checkpoint, "--pattern", "3:8", "--output", output, "--masks", masks)[0] == 0
    code, out, err = run("apply", checkpoint, "--masks", masks, "--output", applied)
    assert code == 0
    assert "4 tensors pruned to 3:8 (keeps 3 of every 8, zeroes 5)" in out
    assert "pruned conv.weight" in err
    assert applied.read_bytes() == output.read_bytes()


@pytest.mark.parametrize("suffix", ["html", "json"])
def test_a_report_is_a_page_or_data(suffix: str, run: Run, checkpoint: Path, tmp_path: Path) -> None:
    report = tmp_path / f"report.{suffix}"
    run("prune", checkpoint, "--pattern", "3:8", "--output", tmp_path / "out.safetensors", "--report", report)
    assert "layer.double" in report.read_text()
    assert report.read_text().startswith("<!doctype html>" if suffix == "html" else "{")
    command = re.search(r"masksolve prune [^<\"]*", report.read_text())
    assert command is not None
    assert "--pattern 3:8 --method exact" in command[0]


def test_a_report_of_another_kind_is_refused(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    code, _, err = run("prune", checkpoint, "--pattern", "3:8", "--output", output, "--report", tmp_path / "r.pdf")
    assert code == 2
    assert "is neither .html nor .json" in err
    assert not output.exists()


def test_a_plan_names_what_fits_and_writes_nothing(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    code, out, _ = run("plan", checkpoint, "--pattern", "4:8", "--pattern", "8:16", "--pattern", "1:512")
    assert code == 0
    assert re.search(r"layer\.half +│ F16 +│ 16x8 +│ fits +│ 16x8 holds no whole 16x16 tile", out)
    assert re.search(r"4:8 \(.*\): 4 of 10 tensors, 1,781 weights; about .* with 1 worker; writes", out)
    assert "1:512: no tensor fits pattern 1:512" in out
    assert sorted(tmp_path.iterdir()) == [checkpoint]


def test_nothing_of_a_table_is_cut_where_no_terminal_has_a_width(run: Run, tmp_path: Path) -> None:
    name = f"{'a.very.long.name.' * 12}weight"
    save_file({name: np.ones((16, 16), np.float32)}, tmp_path / "in.safetensors")
    code, out, _ = run("plan", tmp_path / "in.safetensors")
    assert code == 0
    assert re.search(rf"│ {re.escape(name)} +│", out)
    assert "with 1 worker;" in out


def test_one_is_not_several(run: Run, tmp_path: Path) -> None:
    save_file({"w": np.ones((16, 16), np.float32), "bias": np.ones(4)}, tmp_path / "in.safetensors")
    arguments = ("--pattern", "3:8", "--output", tmp_path / "out.safetensors")
    assert ": 1 tensor pruned to 3:8" in run("prune", tmp_path / "in.safetensors", *arguments)[1]
    out = run("check", tmp_path / "out.safetensors", "--pattern", "3:8")[1]
    assert ": 1 tensor is transposable 3:8 (keeps 3 of every 8, zeroes 5); 1 tensor skipped" in out
    out = run("check", tmp_path / "in.safetensors", "--pattern", "3:8")[1]
    assert ": 1 tensor is not transposable 3:8" in out


def test_a_comparison_shows_what_pruning_changed(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    run("prune", checkpoint, "--pattern", "1:4", "--include", "layer.weight", "--output", output)
    code, out, _ = run("compare", checkpoint, output)
    assert code == 0
    assert re.search(r"layer\.weight +│ values +│ +75\.00% │ +75\.00% │ +0\.00% │ +75\.00% │", out)
    assert "1 of 10 tensors differ, and 0 files beside them" in out
    page, data = tmp_path / "report.html", tmp_path / "report.json"
    for report in (page, data):
        assert run("compare", checkpoint, output, "--report", report)[0] == 0
    assert "layer.weight" in page.read_text()
    assert [each["zeroed"] > 0 for each in json.loads(data.read_text())["tensors"]].count(True) == 1
    code, _, err = run("compare", checkpoint, output, "--report", page)
    assert code == 2
    assert "exists; name another file, or pass --overwrite" in err
    assert run("compare", checkpoint, output, "--report", page, "--overwrite")[0] == 0


def test_names_are_printed_as_they_are(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    save_file({"[bold]a[/bold]": np.ones((8, 8)), "[red]ids": np.arange(3)}, source)
    _, out, err = run("prune", source, "--pattern", "4:8", "--output", tmp_path / "out.safetensors")
    assert "[bold]a[/bold]" in out
    assert "[red]ids" in out
    assert "pruned [bold]a[/bold]" in err


def test_names_control_no_terminal(run: Run, tmp_path: Path) -> None:
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({"\x1b[2Jw\nok x": np.ones((8, 8)), "\x1b[2Jids": np.arange(3)}, source)
    for arguments in (["prune", source, "--output", output], ["check", source], ["plan", source]):
        _, out, err = run(*arguments, "--pattern", "4:8")
        assert r"'\x1b[2Jw\nok x'" in out
        assert "\x1b" not in out + err
    assert r"'\x1b[2Jw\nok x'" in run("compare", source, output)[1]


@pytest.mark.parametrize("glob", ["w.[a-z]*", "w[/.]*"])
def test_globs_are_printed_as_they_are(glob: str, run: Run, tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    save_file({"v": np.ones((8, 8)), "w.a": np.ones((8, 8))}, source)
    code, out, _ = run("prune", source, "--pattern", "4:8", "--output", tmp_path / "out.safetensors", "--exclude", glob)
    assert code == 0
    assert f"excluded by {glob!r}" in out


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
def test_files_whose_names_are_no_text_are_named(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    output = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.safetensors")
    code, out, _ = run("prune", checkpoint, "--pattern", "3:8", "--output", output, "--report", report)
    assert code == 0
    for text in (out, report.read_text()):
        assert r"\udcff.safetensors" in text


def test_one_engine_is_chosen(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["--pattern", "4:8", "--output", tmp_path / "out.safetensors"]
    code, _, err = run("prune", checkpoint, *arguments, "--workers", 2, "--scheduler", "tcp://localhost:1")
    assert code == 2
    assert "--workers starts processes here, --scheduler uses those of a cluster" in err
    code, _, err = run("prune", checkpoint, *arguments, "--timeout", 3)
    assert code == 2
    assert "--timeout is for the workers of a cluster; pass --scheduler with it" in err
    code, _, err = run("prune", checkpoint, "--pattern", "4:8")
    assert code == 2
    assert "nothing to write: pass --output, --masks, or both" in err


def test_a_bug_shows_where_it_is(run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(*arguments: object, **options: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(cli, "prune_checkpoint", spoilt)
    with pytest.raises(ValueError, match="a bug"):
        run("prune", checkpoint, "--pattern", "4:8", "--output", tmp_path / "out.safetensors")


@pytest.mark.parametrize("direction", ["rows", "columns"])
def test_one_sided_pruning_says_so(direction: str, run: Run, checkpoint: Path, tmp_path: Path) -> None:
    output, page, data = (tmp_path / name for name in ("out.safetensors", "report.html", "report.json"))
    options = ["--pattern", "3:8", "--direction", direction]
    code, out, _ = run("prune", checkpoint, *options, "--output", output, "--report", page)
    assert code == 0
    assert f"tensors pruned to 3:8 (keeps 3 of every 8, zeroes 5) along {direction} only, mean" in out
    assert f"one-sided, along {direction} only" in page.read_text()
    assert f"--pattern 3:8 --direction {direction} --method exact" in page.read_text()
    assert run("prune", checkpoint, *options, "--output", output, "--report", data, "--overwrite")[0] == 0
    assert json.loads(data.read_text())["direction"] == direction
    assert f"(keeps 3 of every 8, zeroes 5) along {direction} only: " in run("plan", checkpoint, *options)[1]
    code, out, _ = run("check", output, *options)
    assert code == 0
    assert f"tensors are 3:8 (keeps 3 of every 8, zeroes 5) along {direction};" in out
    assert run("check", output, "--pattern", "3:8")[0] == 1
    # The report is a record.
    assert run("check", output, "--record", data)[0] == 0


def test_layers_get_patterns_of_their_own(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    output, file = tmp_path / "out.safetensors", tmp_path / "patterns.toml"
    globs = ["layer.half=2:4", "*.weight=1:8", "*=4:8"]
    options = [word for glob in globs for word in ("--pattern", glob)]
    code, out, _ = run("prune", checkpoint, *options, "--output", output)
    assert code == 0
    for said in ("2:4 (keeps 2 of every 4, zeroes 2)", "1:8 (keeps 1 of every 8, zeroes 7)", "4:8 (keeps 4 of"):
        assert said in out
    pruned = load_file(output)
    kept = [float((pruned[name] != 0).mean()) for name in ("layer.half", "conv.weight", "layer.weight")]
    assert kept == [0.5, 0.125, 0.125]
    assert run("check", output, *options)[0] == 0
    file.write_text('"layer.half" = "2:4"\n"*.weight" = "1:8"\n"*" = "4:8"\n')
    again = tmp_path / "again.safetensors"
    assert run("prune", checkpoint, "--pattern", file, "--output", again)[0] == 0
    assert again.read_bytes() == output.read_bytes()
    # Each pattern is a plan of its own, those of layers together one more.
    assert "layer.half=2:4" in run("plan", checkpoint, "--pattern", "2:4", "--pattern", file)[1]
    for text, message in (
        ("a.b = '2:4'", "patterns.toml: a is {'b': '2:4'}, not a pattern; a line is a glob and its pattern"),
        ("a = 2:4", "patterns.toml is not TOML"),
        ("", "patterns.toml holds no pattern; a line is a glob and its pattern"),
    ):
        file.write_text(text)
        code, _, err = run("prune", checkpoint, "--pattern", file, "--output", again)
        assert code == 2
        assert message in err


def test_a_check_needs_a_pattern_or_a_record(run: Run, checkpoint: Path) -> None:
    code, _, err = run("check", checkpoint)
    assert code == 2
    assert err == f"masksolve: no record says to which pattern {checkpoint} was pruned; give --pattern\n"


def test_the_data_of_a_report_are_its_dict(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    report, output = tmp_path / "report.json", tmp_path / "out.safetensors"
    assert run("prune", checkpoint, "--pattern", "3:8", "--output", output, "--report", report)[0] == 0
    written = json.loads(report.read_text())
    again = prune_checkpoint(checkpoint, output, "3:8", overwrite=True).to_dict()
    assert written.keys() == again.keys()
    of_time = ("seconds", "tensors")
    assert {name: written[name] for name in written.keys() - of_time} == {
        name: again[name] for name in again.keys() - of_time
    }
    for before, after in zip(written["tensors"], again["tensors"], strict=True):
        assert {**before, "solve_seconds": 0, "certify_seconds": 0} == {
            **after,
            "solve_seconds": 0,
            "certify_seconds": 0,
        }


MISSING = {
    "a library": ("sys.modules['click'] = None", "the masksolve command needs click, which is not installed"),
    # Nothing that installing helps.
    "a name of ours": ("del masksolve.checkpoint.page", "ImportError: cannot import name 'page'"),
}


@pytest.mark.parametrize("what", MISSING)
def test_what_the_command_cannot_import_is_named(what: str) -> None:
    spoil, message = MISSING[what]
    script = f"import sys, masksolve.checkpoint; {spoil}; import masksolve.cli"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert message in done.stderr
    assert ("Traceback" in done.stderr) == (what != "a library")

"""Copies of the repository in which mutants meet their tests.

Each run is a fork of this process, which has imported torch and other libraries, but nothing of this repository;
``mutant_plugin`` proves that it compiled the mutant. Before, the tests of a file run once for the lines that each of
them runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutating import Mutant

os.environ["OMP_NUM_THREADS"] = "1"

REPOSITORY = Path(__file__).resolve().parents[1]

TESTS = {
    "core/featurizers/builtin": ["tests/plugins/dictionary_learning/test_files.py", "tests/plugins/sparsify"],
    "core/featurizers/features": [
        *("tests/core/builtin", "tests/plugins/subspace", "tests/plugins/identity", "tests/plugins/transcoder"),
        *("tests/core/models/test_lowering.py", "tests/core/models/test_operations.py"),
    ],
    "core/featurizers/format": ["tests/core/store"],
    "core/featurizers/files": ["tests/core/store/test_limits.py"],
    "core/featurizers/store": [
        *(f"tests/hub/test_{name}.py" for name in ("load", "push", "sae_lens_catalogue", "sparsify", "circuit_tracer")),
        "tests/core/registry/test_plugins.py",
    ],
    "core/featurizers/models": ["tests/plugins/transcoder/test_interventions.py"],
    "plugins/derived-scalars": ["tests/plugins/patching/test_patch.py"],
    "plugins/sae-lens": [f"tests/hub/test_{name}.py" for name in ("sae_lens_catalogue", "gemma_scope_2")],
    "plugins/sparsify": ["tests/hub/test_sparsify.py"],
}
"""Tests beside those that lie as the code does: ``tests/core/<room>`` and ``tests/plugins/<plugin>``."""
NEAREST = {
    "core/featurizers/builtin": ["tests/core/builtin/test_dictionary.py"],
    "core/featurizers/features": ["tests/core/builtin/test_dictionary.py", "tests/core/features/test_edits.py"],
    "core/featurizers/features/programs.py": ["tests/core/models/test_lowering.py"],
    "core/featurizers/features/site_map.py": [
        f"tests/plugins/transcoder/test_{name}.py" for name in ("linear_map", "interventions")
    ],
    "core/featurizers/files": ["tests/core/files/test_files.py", "tests/core/files/test_torch_files.py"],
    "core/featurizers/format": ["tests/core/format/test_manifest.py", "tests/core/store/test_artefact.py"],
    "core/featurizers/models": ["tests/core/models/test_operations.py"],
    "core/featurizers/models/hooks.py": [
        f"tests/core/models/test_{name}.py" for name in ("operations", "routing", "attention_parts")
    ],
    "core/featurizers/store": ["tests/core/store/test_artefact.py", "tests/core/store/test_limits.py"],
    "core/featurizers/store/loading.py": [
        *("tests/core/store/test_artefact.py", "tests/core/store/test_limits.py"),
        "tests/hub/test_sae_lens_catalogue.py",
    ],
    "core/featurizers/store/converting.py": [
        "tests/core/store/test_artefact.py",
        "tests/plugins/sparsify/test_sparsify.py",
    ],
    "core/featurizers/store/suggestions.py": ["tests/core/registry/test_plugins.py"],
    "core/featurizers/store/pushing.py": ["tests/hub/test_push.py"],
    "plugins/causal-basis": ["tests/plugins/causal_basis/test_extraction.py"],
    "plugins/causal-basis/featurizers_causal_basis/solve/processes.py": [
        "tests/plugins/causal_basis/test_distributed.py"
    ],
    "plugins/derived-scalars": ["tests/plugins/derived_scalars/test_algebra.py"],
    "plugins/derived-scalars/featurizers_derived_scalars/quantities/of_nodes.py": [
        f"tests/plugins/derived_scalars/test_{name}.py" for name in ("algebra", "edges")
    ],
    "plugins/derived-scalars/featurizers_derived_scalars/quantities/tracing.py": [
        f"tests/plugins/derived_scalars/test_{name}.py" for name in ("algebra", "edges", "capture")
    ],
    "plugins/graphs": [f"tests/plugins/graphs/test_{name}.py" for name in ("laws", "graph_files")],
    "plugins/harvest": ["tests/plugins/harvest/test_harvest.py", "tests/plugins/harvest/test_reading.py"],
    "plugins/patching": [f"tests/plugins/patching/test_{name}.py" for name in ("patch", "paths")],
    "plugins/patching/featurizers_patching/engine": ["tests/plugins/patching/test_engine.py"],
    "plugins/training": ["tests/plugins/training/test_search.py"],
    **{
        f"plugins/training/featurizers_training/methods/{name}.py": [
            f"tests/plugins/training/test_{test}.py" for test in ("methods", "search")
        ]
        for name in ("base", "gates", "searches")
    },
    **{
        f"plugins/derived-scalars/featurizers_derived_scalars/{room}": [f"tests/plugins/derived_scalars/test_{name}.py"]
        for room, name in (("capturing", "capture"), ("circuit", "circuits"), ("featurize", "latents"))
    },
}
"""Tests to try first for files that have none of their own name."""
IN_PROCESSES = {
    "core/featurizers/store/suggestions.py",
    "plugins/causal-basis/featurizers_causal_basis/solve/processes.py",
}
"""Files that tests run in other processes, where lines are not traced."""
LEFT_OUT = {
    f"test_{name}.py"
    for name in ("command", "compilation", "demo", "distributed", "docs", "fuzzing", "page", "replacing", "sweep")
}
"""Tests of commands, compilers and many processes, which are too slow to run for each mutant."""

IMPORTED = (
    *("torch", "numpy", "hypothesis", "jaxtyping", "beartype", "safetensors.torch", "pydantic", "huggingface_hub"),
    *("pluggy", "lazy_loader", "pytest", "rich", "typer", "transformers.models.llama.modeling_llama"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "gemma2", "gpt_neox")),
)
"""Libraries that are imported once, before the forks."""


Tried = dict[str, Any]
"""What came of a mutant, as it is stored: name, kind, line, status, number of tests, seconds, and what killed it."""


@dataclass(frozen=True)
class Job:
    """A running fork."""

    pid: int
    start: float
    limit: float
    report: Path
    copy: Path
    mutant: Mutant
    text: str
    count: int
    stage: int


class Bench:
    """Copies of the repository in which mutants run."""

    def __init__(self, work: Path, jobs: int, seconds: float, sources: dict[str, bytes]) -> None:
        self.work, self.seconds, self.sources = work, seconds, sources
        work.mkdir(parents=True, exist_ok=True)
        self.copies = [_copied(work / f"copy{number}") for number in range(jobs)]
        self.traces: dict[str, dict[str, Any]] = {}
        self.stamp = sha256(*(path.read_bytes() for path in sorted(_code(self.copies[0]))))
        for library in IMPORTED:
            with suppress(ImportError):
                __import__(library)

    def run(self, pending: list[Mutant], *, wide: bool) -> Iterator[Tried]:
        """Yield results as they come; if wide, mutants that the first tests do not kill meet the others that fit.

        A stage of a mutant is the tests of its nearest files, then those of one file after the other.
        """
        free, running = list(self.copies), list[Job]()
        stages = deque((mutant, 0, 0) for mutant in pending)
        while stages or running:
            if free and stages:
                mutant, stage, count = stages.popleft()
                files = fitting(mutant.file, self.copies[0])
                if chosen := self._chosen(mutant, files[stage]):
                    running.append(self._started(mutant, chosen, free.pop(), stage, count))
                elif stage + 1 < len(files) and (wide or not count):
                    stages.appendleft((mutant, stage + 1, count))
                else:
                    yield _tried(mutant, "survived", 0.0, "" if count else "no test runs it", count)
                continue
            for job, tried in self._finished(running, free):
                is_last = job.stage + 1 == len(fitting(job.mutant.file, self.copies[0]))
                if wide and tried["status"] == "survived" and not is_last:
                    stages.appendleft((job.mutant, job.stage + 1, job.count))
                else:
                    yield tried

    def _chosen(self, mutant: Mutant, files: list[str]) -> list[tuple[str, float]]:
        """Return tests to run with their CPU seconds, fastest first.

        They are those that run the mutant's lines; all, if none does and the lines run at import or in another process.
        """
        of_file, of_lines = {}, {}
        for test_file in files:
            for name, test in self._trace(test_file).items():
                of_file[name] = test["seconds"]
                lines = test["ran"].get(mutant.file, ())
                if any(mutant.lines[0] <= line <= mutant.lines[1] for line in lines):
                    of_lines[name] = test["seconds"]
        elsewhere = mutant.file in IN_PROCESSES or mutant.at_import
        chosen, total = [], 0.0
        for name, seconds in sorted((of_lines or (of_file if elsewhere else {})).items(), key=lambda item: item[1]):
            total += seconds
            if total < self.seconds or not chosen:
                chosen.append((name, seconds))
        return chosen

    def _trace(self, test_file: str) -> dict[str, Any]:
        """Return the lines that each test of a file runs, from an earlier trace if nothing has changed since."""
        if test_file in self.traces:
            return self.traces[test_file]
        copy = self.copies[0]
        stamp = sha256(self.stamp.encode(), (copy / test_file).read_bytes())
        kept = self.work / f"{test_file.replace('/', '+')}.json"
        if not kept.exists() or json.loads(kept.read_text())["stamp"] != stamp:
            report = self.work / "trace.json"
            report.unlink(missing_ok=True)
            roots = os.pathsep.join((f"{copy}/core/", f"{copy}/plugins/"))
            start = time.monotonic()
            pid = _fork(
                copy, [test_file], {"MUTANT_ROOTS": roots, "MUTANT_REPORT": str(report)}, self.work / "trace.txt"
            )
            os.waitpid(pid, 0)
            said = json.loads(report.read_text()) if report.exists() else {"tests": {}, "failed": []}
            tests = {
                name: {
                    "seconds": test["seconds"],
                    "ran": {os.path.relpath(file, copy): lines for file, lines in test["ran"].items()},
                }
                for name, test in said["tests"].items()
                if name not in said["failed"]
            }
            kept.write_text(json.dumps({"stamp": stamp, "tests": tests}))
            print(
                f"{test_file}: {len(tests)} tests, {time.monotonic() - start:.0f} s; not used: {said['failed'][:3]}",
                flush=True,
            )
        self.traces[test_file] = json.loads(kept.read_text())["tests"]
        return self.traces[test_file]

    def _started(self, mutant: Mutant, chosen: list[tuple[str, float]], copy: Path, stage: int, count: int) -> Job:
        text = mutant.applied(self.sources[mutant.file])
        (copy / mutant.file).write_bytes(text)
        report = copy.with_suffix(".json")
        report.unlink(missing_ok=True)
        environment = {"MUTANT_FILE": str(copy / mutant.file), "MUTANT_REPORT": str(report), "MUTANT_ROOTS": ""}
        pid = _fork(copy, [name for name, _ in chosen], environment, copy.with_suffix(".txt"), "-x")
        limit = 60 + 10 * sum(seconds for _, seconds in chosen)
        return Job(pid, time.monotonic(), limit, report, copy, mutant, sha256(text), count + len(chosen), stage)

    def _finished(self, running: list[Job], free: list[Path]) -> Iterator[tuple[Job, Tried]]:
        time.sleep(0.02)
        for job in list(running):
            took = time.monotonic() - job.start
            pid, status = os.waitpid(job.pid, os.WNOHANG)
            late = pid == 0 and (_cpu_seconds(job.pid) > job.limit or took > 10 * job.limit)
            if pid == 0 and not late:
                continue
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
            if late:
                os.waitpid(job.pid, 0)
            (job.copy / job.mutant.file).write_bytes(self.sources[job.mutant.file])
            running.remove(job)
            free.append(job.copy)
            yield job, _judged(job, None if late else os.waitstatus_to_exitcode(status), took)


def _judged(job: Job, code: int | None, took: float) -> Tried:
    """Return what came of a mutant: killed only if the text that was compiled is the mutant's."""
    said = json.loads(job.report.read_text()) if job.report.exists() else {"compiled": [], "failed": []}
    if code is None:
        return _tried(job.mutant, "killed", took, "time", job.count)
    if not said["compiled"] and code >= 0:
        return _tried(job.mutant, "not run", took, "the mutant was not imported", job.count)
    if said["compiled"] not in ([job.text], []):
        raise SystemExit(f"{job.mutant.name}: compiled {said['compiled']}, not the mutant")
    if not said["failed"] and "not found: " in job.copy.with_suffix(".txt").read_text():
        return _tried(job.mutant, "not run", took, "its tests are not found", job.count)
    if code == 0:
        return _tried(job.mutant, "survived", took, "", job.count)
    return _tried(job.mutant, "killed", took, (said["failed"] or ["it cannot be imported"])[0], job.count)


def _tried(mutant: Mutant, status: str, took: float, why: str, tests: int) -> Tried:
    print(f"{status:8} {took:5.0f} s  {tests:4} tests  {mutant.name[:200]!r}  {why}", flush=True)
    return Tried(
        mutant=mutant.name,
        kind=mutant.kind,
        line=mutant.lines[0],
        status=status,
        tests=tests,
        seconds=round(took),
        by=why,
    )


def _fork(copy: Path, tests: list[str], environment: dict[str, str], output: Path, *options: str) -> int:
    """Run pytest in a fork of this process, which leads a group of its own; return its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        paths = [
            str(copy / "core"),
            *map(str, sorted((copy / "plugins").iterdir())),
            str(copy),
            str(copy / "benchmarks"),
        ]
        os.chdir(copy)
        os.environ.update(environment, PYTHONPATH=os.pathsep.join(paths))
        sys.path[:0] = paths
        sys.argv = ["pytest"]
        sys.dont_write_bytecode = bool(environment.get("MUTANT_FILE"))
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        if sys.dont_write_bytecode:
            _forget(Path(environment["MUTANT_FILE"]))
        import pytest

        code = int(
            pytest.main(
                [
                    "-p",
                    "mutant_plugin",
                    "-p",
                    "no:cacheprovider",
                    "-p",
                    "no:xdist",
                    "-q",
                    "-oaddopts=--import-mode=importlib",
                    *options,
                    *tests,
                ]
            )
        )
    finally:
        os._exit(code)


def fitting(file: str, root: Path) -> list[list[str]]:
    """Return the files of tests that fit a file, by convention and the tables: those to try first, then each other."""
    parts = Path(file).parts
    own = f"tests/core/{parts[2]}" if parts[0] == "core" else f"tests/plugins/{parts[1].replace('-', '_')}"
    paths = [own, *(test for length in (2, 3) for test in TESTS.get("/".join(parts[:length]), []))]
    found: dict[str, None] = {}
    for path in map(root.joinpath, paths):
        for test in sorted(path.glob("test_*.py")) if path.is_dir() else [path]:
            if test.name not in LEFT_OUT:
                found[str(test.relative_to(root))] = None
    named = [f"{own}/test_{Path(file).stem}.py"]
    tables = [NEAREST.get("/".join(parts[:length]), []) for length in (len(parts), 4, 3, 2)]
    first = [test for test in named if test in found] or next(filter(None, tables), [])
    rest = [test for test in found if test not in first]
    return [tests for tests in (first, *([test] for test in rest)) if tests]


def _copied(copy: Path) -> Path:
    """Bring a copy of the working tree up to date; what has not changed keeps its compiled files."""
    listed = (
        subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            *(),
            cwd=REPOSITORY,
            check=True,
            capture_output=True,
        )
        .stdout.decode()
        .split("\0")
    )
    names = {name for name in listed if name and (REPOSITORY / name).is_file()}
    for name in names:
        target, text = copy / name, (REPOSITORY / name).read_bytes()
        if not target.exists() or target.read_bytes() != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(text)
            _forget(target)
    for path in [path for path in copy.rglob("*.py") if str(path.relative_to(copy)) not in names]:
        path.unlink()
    return copy


def _code(copy: Path) -> list[Path]:
    return [path for folder in ("core", "plugins") for path in (copy / folder).rglob("*.py")]


def _forget(path: Path) -> None:
    """Remove the compiled files of a module: their stamp, size and second, may fit a mutant too."""
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()


def _cpu_seconds(pid: int) -> float:
    """Return the seconds of the CPU that a process took, and its children that have ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def sha256(*texts: bytes) -> str:
    """Return the hash of texts, with a zero byte between them."""
    return hashlib.sha256(b"\0".join(texts)).hexdigest()

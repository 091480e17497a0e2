"""Coverage-guided fuzzing of every reader of untrusted bytes; see SECURITY.md.

Run ``python benchmarks/fuzz.py TARGET -max_total_time=600`` with atheris installed; the options are libFuzzer's. Any
exception but a `FeaturizerError` is a crash, and so is a header that is accepted here and refused by safetensors, more
than 4 GB of memory, or more than 10 seconds for one input.
"""

from __future__ import annotations

import io
import json
import random
import struct
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import atheris
import numpy as np
import torch  # before the instrumentation, which would take minutes for it
import transformers  # noqa: F401
from safetensors import safe_open

PACKAGES = [
    "featurizers",
    *(f"featurizers_{name}" for name in ("dictionary_learning", "identity", "sae_lens", "sparsify", "subspace")),
]
with atheris.instrument_imports(include=[*PACKAGES, "zipfile", "pickletools"], enable_loader_override=False):
    import featurizers
    from featurizers.errors import FeaturizerError
    from featurizers.files import numpy_files, torch_files
    from featurizers.format import external_files, manifest, weights  # noqa: F401
    from featurizers.registry import host
    from featurizers.store import artefact, loading  # noqa: F401

    host().load_all()


SCRATCH = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
WHERE = "fuzzed"


def config(data: bytes) -> None:
    """Read a ``config.json``, and build what is accepted without weights."""
    record = manifest.parse(data, WHERE)
    if isinstance(record, manifest.Manifest):
        assert artefact.most_bytes(record, WHERE) >= 0
    manifest.dump(record)


def header(data: bytes) -> None:
    """Read a safetensors header; safetensors must read one that is accepted in the same way."""
    path = SCRATCH / "header.safetensors"
    raw = data[2:]
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(int.from_bytes(data[:2], "little")))
    specs = weights.read_header(path, WHERE)
    with safe_open(path, framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        assert found == {name: spec.shape for name, spec in specs.items()}
    weights.read_tensors(path, None, WHERE, allow_nonfinite=True)


def tensors(data: bytes) -> None:
    """Read a whole safetensors file."""
    path = SCRATCH / "whole.safetensors"
    path.write_bytes(data)
    weights.read_header(path, WHERE)
    weights.read_tensors(path, None, WHERE)


def pair(data: bytes) -> None:
    """Load a folder whose config and weights are separated by a marker."""
    folder = SCRATCH / "artefact"
    folder.mkdir(exist_ok=True)
    config, _, tensors = data.partition(b"\0\0\0\0CUT\0\0\0\0")
    (folder / "config.json").write_bytes(config)
    (folder / "model.safetensors").write_bytes(tensors)
    featurizers.load(folder)


def pickle(data: bytes) -> None:
    """Load a ``.pt`` file with this pickle and the data of two tensors."""
    path = SCRATCH / "state.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in {"data.pkl": data, "byteorder": b"little", "data/0": bytes(96), "data/1": bytes(8)}.items():
            archive.writestr(f"archive/{name}", part)
        archive.writestr("archive/version", b"3\n")
    torch_files.load_torch(path, WHERE)


def torch_file(data: bytes) -> None:
    """Load a whole ``.pt`` file."""
    path = SCRATCH / "whole.pt"
    path.write_bytes(data)
    torch_files.load_torch(path, WHERE)


def array(data: bytes) -> None:
    """Load an ``.npz`` file with this array."""
    path = SCRATCH / "arrays.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if data[:1] == b"\1" else zipfile.ZIP_STORED) as archive:
        archive.writestr("W_enc.npy", data[1:])
    numpy_files.load_npz(path, WHERE)


def npz(data: bytes) -> None:
    """Load a whole ``.npz`` file."""
    path = SCRATCH / "whole.npz"
    path.write_bytes(data)
    numpy_files.load_npz(path, WHERE)


FORMATS = {"sae-lens": "relu", "sparsify": "topk", "dictionary-learning": "relu"}
"""Formats of other libraries, and a rule that each can hold."""


def others(data: bytes) -> None:
    """Load a config of another library, which the first byte selects, with the weights of a valid one."""
    folder = SCRATCH / sorted(FORMATS)[data[0] % 3 if data else 0]
    next(folder.glob("*.json")).write_bytes(data[1:])
    featurizers.load(folder)


def _seeds() -> dict[Callable[[bytes], None], list[bytes]]:
    """Return valid inputs of each target, from which the fuzzer starts."""
    made = SCRATCH / "made"
    f = featurizers.create("subspace", d_in=8, n_features=3, seed=0)
    f.feature_sets = {"best": torch.tensor([1])}
    f.site = featurizers.Site("resid.post", 3).at(position=(-1,), model="owner/model")
    f.save_pretrained(made / "a")
    (f >> featurizers.create("identity")).save_pretrained(made / "b")
    featurizers.create("dictionary", d_in=4, n_features=8).save_pretrained(made / "c")
    featurizers.save_collection({"a": f, "b/c": f}, made / "many")
    configs = [path.read_bytes() for path in made.rglob("config.json")]
    files = [path.read_bytes() for path in made.rglob("model.safetensors")]
    headers = [raw[8 : 8 + int.from_bytes(raw[:8], "little")] for raw in files]
    sizes = [len(raw) - 8 - int.from_bytes(raw[:8], "little") for raw in files]
    states = []
    for state in (
        {"a": torch.ones(8, 3), "b": [1, "x", None, (2.5, True)]},
        torch.nn.Linear(3, 8).state_dict(),
        {"a": torch.nn.Parameter(torch.ones(8, 3).T), "d": torch.float16, "s": torch.Size([3])},
    ):
        buffer = io.BytesIO()
        torch.save(state, buffer)
        states.append(buffer.getvalue())
    arrays = []
    for value in (np.ones((4, 8), np.float32), np.ones(3, np.int64), np.asfortranarray(np.ones((4, 8)))):
        buffer = io.BytesIO()
        np.save(buffer, value)
        arrays.append(buffer.getvalue())
    archives = []
    for save in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        save(buffer, W_enc=np.ones((4, 8), np.float32), b=np.zeros(0))
        archives.append(buffer.getvalue())
    pickled = []
    for state in states:
        with zipfile.ZipFile(io.BytesIO(state)) as archive:
            pickled.append(archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl"))))
    configs_of_others = []
    for number, (name, rule) in enumerate(sorted(FORMATS.items())):
        settings = {"k": 2} if rule == "topk" else {}
        f = featurizers.create("dictionary", d_in=4, n_features=8, rule=rule, rule_options=settings)
        f.site = featurizers.Site("resid.post", 3)
        featurizers.convert(f, SCRATCH / name, to=name)
        configs_of_others.append(bytes([number]) + next((SCRATCH / name).glob("*.json")).read_bytes())
    return {
        config: configs,
        header: [struct.pack("<H", size) + raw for size, raw in zip(sizes, headers, strict=True)],
        tensors: files,
        pair: [c + b"\0\0\0\0CUT\0\0\0\0" + w for c, w in zip(configs, files, strict=False)],
        pickle: pickled,
        torch_file: states,
        array: [b"\0" + raw for raw in arrays] + [b"\1" + raw for raw in arrays],
        npz: archives,
        others: configs_of_others,
    }


EXTREMES = (0, 1, -1, 2**31, 2**63, 10**400, 0.5, -1e308, True, None, "", "a" * 300, "../a",
            "\x1b[2J", "os.system", [], {}, [[]], {"": {}})  # fmt: skip


def mutated(data: bytes, most: int, seed: int) -> bytes:
    """Change a value of the JSON in the data, or, half the time, its bytes as libFuzzer does."""
    chance = random.Random(seed)
    start = data.find(b"{")
    try:
        if chance.random() < 0.5 or start < 0:
            raise ValueError
        document, end = json.JSONDecoder().raw_decode(data[start:].decode("latin-1"))
        places = [document]
        for place in places:
            items = place.values() if isinstance(place, dict) else place
            places += [item for item in items if isinstance(item, dict | list)]
        place = chance.choice(places)
        value = chance.choice([*EXTREMES, *(v for p in places for v in (p.values() if isinstance(p, dict) else p))])
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = chance.choice(list(keys) or [""])
        if chance.random() < 0.2 and keys:
            del place[key]
        elif isinstance(place, dict):
            place[key if chance.random() < 0.8 else str(value)[:50]] = value
        else:
            place.insert(chance.randrange(len(place) + 1), value)
        raw = json.dumps(document, ensure_ascii=False).encode("latin-1", "replace")
        return (data[:start] + raw + data[start + end :])[:most]
    except (ValueError, RecursionError):
        return atheris.Mutate(data, most)


def main() -> None:
    """Fuzz one target."""
    warnings.simplefilter("ignore")
    seeds = _seeds()
    targets = {target.__name__: target for target in seeds}
    if len(sys.argv) < 2 or sys.argv[1] not in targets:
        sys.exit(f"usage: fuzz.py {{{','.join(targets)}}} [libFuzzer options]")
    target = targets[sys.argv.pop(1)]
    corpus = SCRATCH / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds[target]):
        (corpus / str(number)).write_bytes(seed)
    counts = {"accepted": 0, "refused": 0}

    def one(data: bytes) -> None:
        try:
            target(data)
        except FeaturizerError as error:
            if not str(error).isprintable() or len(str(error)) > 2000:
                raise AssertionError("an error that is too long, or not printable") from error
            counts["refused"] += 1
        else:
            counts["accepted"] += 1
        if (total := sum(counts.values())) % 10_000 == 0:
            print(f"{target.__name__}: {total} inputs, {counts}", file=sys.stderr, flush=True)

    arguments = [sys.argv[0], "-timeout=10", "-rss_limit_mb=4096", "-max_len=16384", *sys.argv[1:]]
    if not any(Path(argument).exists() for argument in sys.argv[1:]):  # else an input to repeat
        arguments.append(str(corpus))
    atheris.Setup(arguments, one, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

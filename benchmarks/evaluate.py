"""Evaluation of a dictionary by `featurizers.evaluate`, `sae_lens.evals`, and the forward passes that it needs."""

from __future__ import annotations

import functools
import importlib
import warnings
from dataclasses import dataclass
from typing import Any

import featurizers
import torch
from dictionaries import pair
from models import gpt2, prompts
from timing import Benchmark, Case, Settings, Skipped, same
from torch import Tensor


@dataclass(frozen=True)
class Work:
    """A model, a dictionary in both libraries, and documents.

    Attributes:
        model: a GPT-2.
        ours: dictionary at the output of a block in the middle.
        theirs: the same of SAELens.
        layer: of the block.
        ids: token ids, ``(documents, tokens)``.
    """

    model: Any
    ours: featurizers.DictionaryFeaturizer
    theirs: Any
    layer: int
    ids: Tensor

    def what(self) -> str:
        """Return a description for the table."""
        documents, tokens = self.ids.shape
        config = self.model.config
        return (
            f"evaluate {self.ours.n_features} features in the middle of {config.n_layer} layers, d={config.n_embd}, "
            f"{documents} documents × {tokens} tokens"
        )

    def evaluate(self, **options: Any) -> Any:
        """Evaluate by this library."""
        return featurizers.evaluate(self.ours, self.model, self.ids, progress=False, **options)


@functools.lru_cache(maxsize=1)
def work(settings: Settings) -> Work:
    """Build what all cases measure."""
    layers, width, vocabulary = settings.size(12, 4), settings.size(768, 64), settings.size(50257, 100)
    length = settings.size(64, 8)
    model = gpt2(settings, layers=layers, width=width, vocabulary=vocabulary, length=length).requires_grad_(False)
    ours, theirs = pair(settings, settings.size(16384, 128), "topk", width)
    layer = layers // 2 - 1
    ours.site = featurizers.Site("resid.post", layer)
    theirs.cfg.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
    theirs.cfg.metadata.hook_head_index = None
    return Work(model, ours, theirs, layer, prompts(settings, 8, length, vocabulary))


def sae_lens(settings: Settings) -> Case:
    """Compare with all of SAELens' metrics of a dictionary, which knows no mean ablation and no intervals."""
    given = work(settings)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evals = importlib.import_module("sae_lens.evals")
            scaler = importlib.import_module("sae_lens.training.activation_scaler").ActivationScaler()
            lens = importlib.import_module("transformer_lens")
            convert = importlib.import_module("transformer_lens.pretrained.weight_conversions.gpt2")
            hooked = _hooked(lens, convert.convert_gpt2_weights, given.model, settings)
    except (ImportError, AttributeError) as error:
        raise Skipped(f"the peer, sae_lens.evals with TransformerLens, cannot be used: {error}") from error
    documents, tokens = given.ids.shape

    class Store:
        """The documents, as `sae_lens.evals` asks for them."""

        store_batch_size_prompts = documents
        context_size = tokens

        def get_batch_tokens(self, size: int) -> Tensor:
            return given.ids

        def reset_input_dataset(self) -> None:
            """Begin again."""

    config = evals.get_eval_everything_config(documents, 1, 1)

    def theirs() -> dict[str, Any]:
        scalars, _ = evals.run_evals(given.theirs, Store(), hooked, scaler, config, exclude_special_tokens=False)
        return {key: value for group in scalars.values() for key, value in group.items()}

    def ours() -> Any:
        return given.evaluate(ablations=["zero"])

    def check() -> str:
        expected, found = theirs(), ours().metrics.values()
        numbers = [(metric.value, expected[metric.sae_lens]) for metric in found if metric.sae_lens]
        ratios = torch.tensor([mine / other for mine, other in numbers])
        return same(ratios, torch.ones(len(ratios)), 5e-3, f"{len(numbers)} metrics")

    return Case(given.what(), "`sae_lens.evals.run_evals`, all metrics", ours, theirs, check)


def _hooked(lens: Any, convert: Any, model: Any, settings: Settings) -> Any:
    config = model.config
    cfg = lens.HookedTransformerConfig(
        n_layers=config.n_layer,
        d_model=config.n_embd,
        n_heads=config.n_head,
        d_head=config.n_embd // config.n_head,
        d_mlp=4 * config.n_embd,
        n_ctx=config.n_positions,
        d_vocab=config.vocab_size,
        act_fn="gelu_new",
        device=str(settings.device),
    )
    hooked = lens.HookedTransformer(cfg)
    hooked.load_state_dict(convert(model, cfg), strict=False)
    return hooked.eval().requires_grad_(False)


def forwards(settings: Settings) -> Case:
    """Compare with the forward passes that the metrics need, by plain hooks, and one encoding and decoding."""
    given = work(settings)
    block = given.model.transformer.h[given.layer]
    f = given.ours

    @torch.no_grad()
    def run(edit: Any = None) -> Tensor:
        def hook(_: Any, __: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            edited = edit(hidden)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        handle = None if edit is None else block.register_forward_hook(hook)
        try:
            logits: Tensor = given.model(given.ids, use_cache=False).logits
        finally:
            if handle is not None:
                handle.remove()
        return logits

    def theirs() -> None:
        site = f"resid.post:{given.layer}"
        x = featurizers.collect(given.model, {"input_ids": given.ids}, [site])[site]
        mean = x.mean(dim=(0, 1))
        run()
        run(lambda x: f.reconstruct(x)[1])
        run(torch.zeros_like)
        run(mean.expand_as)

    def check() -> str:
        logits = run(lambda x: f.reconstruct(x)[1])[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits.float(), given.ids[:, 1:].flatten())
        found = torch.tensor(given.evaluate()["ce_loss"])
        return same(found, loss.double().cpu(), 1e-4, "loss with the reconstruction")

    peer = "plain forward passes: clean, to the site, and with reconstruction, zeros and means; one encoding"
    return Case(given.what() + ", with mean ablation", peer, given.evaluate, theirs, check)


BENCHMARKS = (
    Benchmark("evaluate-sae-lens", sae_lens, required=2),
    Benchmark("evaluate-forwards", forwards, "at most", 1.15),
)

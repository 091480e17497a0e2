"""Models that are compiled in any way: edits are those of plain hooks on a copy that was never compiled."""

import subprocess
import sys
import threading

import featurizers
import pytest
import torch
from featurizers import Steer, collect, intervene
from featurizers.errors import UsageError
from featurizers.models import restarted, run_until, wrap_like

from tests.support.models import WIDTH, fresh_model, hooked, prompts, read

after_torch_2_8 = pytest.mark.skipif(
    torch.__version__.startswith("2.8."), reason="torch 2.8 cannot compile a model whose hooks hold a dataclass"
)

IDS = prompts(2, 4)
SITES = {"resid.post:1": ("model.layers.1", "output"), "mlp.act:1": ("model.layers.1.mlp.down_proj", "input")}


def compiled(module):
    return torch.compile(module, backend="eager")


def whole(model):
    return compiled(model)


def in_place(model):
    model.compile(backend="eager")
    return model


def a_forward(model):
    model.forward = compiled(model.forward)
    return model


def a_decoder(model):
    model.model = compiled(model.model)
    return model


def a_layer(model):
    model.model.layers[1].compile(backend="eager")
    return model


def a_function_around_it(model):
    def run(ids):
        return model(ids)

    return compiled(run)


def stance():
    """What `torch.compiler` does with a compiled function now."""
    from torch._dynamo import eval_frame

    return eval_frame._stance.stance


@pytest.fixture(autouse=True)
def _no_traces():
    yield
    assert stance() == "default"
    torch.compiler.reset()


def steered(model, site, call):
    width = WIDTH if site.startswith("resid") else model.config.intermediate_size
    f = featurizers.create("identity", d_in=width)
    with torch.no_grad(), intervene(model, {site: Steer(f, delta=3.0)}):
        return call(IDS).logits


@pytest.mark.parametrize("way", [whole, in_place, a_forward, a_decoder, a_layer, a_function_around_it])
def test_an_edit_of_a_model_that_ran_compiled_is_that_of_a_plain_hook(way):
    plain, model = fresh_model("llama"), fresh_model("llama")
    call = way(model)
    with torch.no_grad():
        clean = call(IDS).logits
    for site, (path, side) in SITES.items():
        with torch.no_grad(), hooked(plain.get_submodule(path), side, lambda hidden: hidden + 3.0):
            wanted = plain(IDS).logits
        found = steered(model, site, call)
        assert not torch.allclose(found, clean, atol=1e-3)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(call(IDS).logits, clean)


def test_the_compiled_model_itself_is_edited_and_read():
    plain, model = fresh_model("llama"), fresh_model("llama")
    outer = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        outer(IDS, use_cache=False)
    path, side = SITES["mlp.act:1"]
    with torch.no_grad(), hooked(plain.get_submodule(path), side, lambda hidden: hidden + 3.0):
        wanted = plain(IDS).logits
    torch.testing.assert_close(steered(outer, "mlp.act:1", outer), wanted, rtol=1e-5, atol=1e-5)
    known = read(plain, plain.get_submodule(path), side, input_ids=IDS)
    torch.testing.assert_close(collect(outer, {"input_ids": IDS}, ["mlp.act:1"])["mlp.act:1"], known)


def operations():
    return {"resid.post:1": Steer(featurizers.create("identity", d_in=WIDTH), delta=3.0)}


@pytest.mark.parametrize("first_out", [0, 1])
def test_contexts_that_end_in_any_order_restore_the_stance(first_out):
    model = fresh_model("llama")
    model(IDS)
    contexts = [intervene(model, operations()), intervene(fresh_model("llama"), operations())]
    for context in contexts:
        context.__enter__()
    contexts[first_out].__exit__(None, None, None)
    assert stance() == "force_eager"
    contexts[1 - first_out].__exit__(None, None, None)
    assert stance() == "default"


def test_an_exception_and_a_refusal_restore_the_stance():
    model = fresh_model("llama")
    model(IDS)
    with pytest.raises(ZeroDivisionError), intervene(model, operations()):
        raise ZeroDivisionError
    assert stance() == "default"
    with pytest.raises(featurizers.errors.PositionError):
        collect(model, {"input_ids": IDS}, ["resid.post:1"], positions=[9])


def test_the_stance_of_the_user_comes_back_or_stays():
    model = fresh_model("llama")
    with torch.compiler.set_stance("eager_on_recompile"):
        with intervene(model, operations()):
            assert stance() == "force_eager"
        assert stance() == "eager_on_recompile"
        with intervene(model, operations()):
            torch.compiler.set_stance("fail_on_recompile")
        assert stance() == "fail_on_recompile"


def test_contexts_of_several_threads_share_one_stance():
    model, inside, leave = fresh_model("llama"), threading.Event(), threading.Event()
    model(IDS)

    def other():
        with intervene(fresh_model("llama"), operations()):
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with intervene(model, operations()):
        thread.start()
        assert inside.wait(60)
    assert stance() == "force_eager"
    leave.set()
    thread.join()


def test_a_context_inside_a_compiled_function_is_refused():
    model, edits = fresh_model("llama"), operations()
    model(IDS)

    @torch.compile(backend="eager")
    def step(ids):
        with intervene(model, edits):
            return model(ids).logits

    with pytest.raises(UsageError, match=r"inside a function that torch\.compile compiles"):
        step(IDS)


def test_dynamo_is_not_imported_for_nothing():
    program = """
import sys, torch, featurizers
model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
op = featurizers.Steer(featurizers.create("identity", d_in=2), delta=1.0)
with featurizers.intervene(model, {"module:0:output": op}):
    model(torch.zeros(1, 2))
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


@after_torch_2_8
@pytest.mark.parametrize("first", ["import torch._dynamo", ""], ids=["dynamo", "no dynamo yet"])
def test_what_is_compiled_inside_a_context_does_not_outlive_it(first):
    program = f"""
import torch, featurizers
{first}
model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
x = torch.ones(1, 2, 2)
clean = model(x)
op = featurizers.Steer(featurizers.create("identity", d_in=2), delta=3.0)
with featurizers.intervene(model, {{"module:0:output": op}}):
    compiled = torch.compile(model, backend="eager")
    assert not torch.allclose(compiled(x), clean)
assert torch.equal(compiled(x), clean)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_runs_up_to_a_module_and_from_the_middle_are_those_of_the_model_that_was_never_compiled():
    plain = fresh_model("llama")
    model = whole(fresh_model("llama"))
    with torch.no_grad():
        expected = plain(IDS).logits
        model(IDS)  # compiled now
        inner = model._orig_mod.model
        assert run_until(inner.layers[0], lambda: model(IDS)) is None
        hidden = torch.randn(*IDS.shape, WIDTH)
        with restarted(inner.layers, 0, hidden, wrap_like(hidden)):
            again = model(IDS).logits
        with hooked(plain.model.layers[0], "output", lambda _: hidden):
            torch.testing.assert_close(again, plain(IDS).logits)
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)  # compiled

"""The backward pass in layers: against autograd through the whole model, and from the middle on."""

import pytest
import torch

from qmix.errors import CheckpointError
from qmix.formats import open_checkpoint
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.quantize.calibrated import loss_gradients
from qmix.quantize.calibrated.layer_gradients import InnerGradients, LayerGradients
from qmix.quantize.calibrated.loss_gradients import LossGradients, moments_name
from qmix.quantize.calibrated.options import CalibratedOptions, LayerOptions
from qmix.quantize.calibrated.resume import RunState
from qmix.weights.dense import Dense
from qmix.work_meter import WorkMeter
from tests.support.calibration import LAYERS, contents, run, windows, write_source

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "source")


def gradient_pass(source, folder, digests, keep=lambda digests: None, **options):
    folder.mkdir(exist_ok=True)
    settings = CalibratedOptions(layer=LayerOptions(objective="loss"), **options)
    meter = WorkMeter({"pass": 1e-9})
    checkpoint = open_checkpoint(source)
    return LossGradients(checkpoint, windows().ids, settings, folder, digests, keep, meter)


def expected_sums(source):
    """By one ordinary backward pass, with hooks on every linear layer."""
    model = MixtralForCausalLM.from_pretrained(source, dtype=torch.float32, device="cpu").eval()
    outputs = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(
                lambda module, args, out, name=name: outputs.update({name: out})
            )
    logits = model(input_ids=windows().ids).logits
    vectors = loss_gradients._draw(
        logits.detach().flatten(0, 1), torch.Generator().manual_seed(loss_gradients._SEED)
    )
    base = [f"model.layers.{layer}.self_attn" for layer in range(LAYERS)]
    watched = [outputs[f"{each}.{part}_proj"] for each in base for part in "qkvo"]
    grads = torch.autograd.grad(logits, watched, vectors.view_as(logits), retain_graph=True)
    sums = []
    for layer in range(LAYERS):
        q, k, v, o = (grad.flatten(0, 1) for grad in grads[4 * layer : 4 * layer + 4])
        qkv = torch.cat((q, k, v), 1)
        sums.append((qkv.T @ qkv, o.T @ o))
    return sums


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-3)], ids=str
)
def test_the_sums_are_those_of_a_backward_pass_through_the_whole_model(
    source, tmp_path, monkeypatch, dtype, error
):
    """States between layers in 16 bits cost a thousandth of the largest sums, and no more."""
    monkeypatch.setattr(loss_gradients, "_DTYPE", dtype)
    digests = {}
    gradient_pass(source, tmp_path / "pass", digests).run()
    for layer, (qkv, attention) in enumerate(expected_sums(source)):
        path = tmp_path / "pass" / moments_name(layer)
        found = LayerGradients.read(path, torch.device("cpu"))
        for sums, exact in ((found.qkv, qkv), (found.attention, attention)):
            torch.testing.assert_close(sums, exact, rtol=1e-3, atol=error * float(exact.max()))
        assert float(found.experts.diagonal().min()) >= 0


def test_a_random_vector_has_the_second_moments_of_the_divergence():
    logits = torch.tensor([[2.0, 0.5, -1.0, 0.0]])
    p = logits.softmax(-1)[0]
    drawn = loss_gradients._draw(logits.expand(40000, -1), torch.Generator().manual_seed(1))
    expected = p.diag() - torch.outer(p, p)
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), expected, rtol=0, atol=0.006)


def test_from_any_step_on_the_files_are_the_same(source, tmp_path):
    whole = {}
    gradient_pass(source, tmp_path / "whole", whole).run()
    steps = []
    gradient_pass(source, tmp_path / "count", {}, lambda files: steps.append(dict(files))).run()
    assert len(steps) == 2 * LAYERS + 2  # the embedding, layers, the head, layers again
    for step in range(1, len(steps)):
        kept, left = {}, [step]

        def keep(files, kept=kept, left=left):
            kept.clear()
            kept.update(files)
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

        folder = tmp_path / f"from-{step}"
        with pytest.raises(KeyboardInterrupt):
            gradient_pass(source, folder, {}, keep, activation_bytes=0).run()
        again = dict(kept)
        gradient_pass(source, folder, again, activation_bytes=step % 2 << 30).run()
        for layer in range(LAYERS):
            assert again[moments_name(layer)] == whole[moments_name(layer)]


def killed_after(steps, source, out, monkeypatch):
    """A run that is killed once it has written its state so often."""
    write, written = RunState.write, []

    def stop(state, folder):
        write(state, folder)
        written.append(state)
        if len(written) == steps:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunState, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            run(source, out, objective="loss")


def test_a_run_killed_in_the_backward_pass_ends_with_the_same_bytes(source, tmp_path, monkeypatch):
    run(source, tmp_path / "whole", objective="loss")
    killed_after(LAYERS + 3, source, tmp_path / "out", monkeypatch)
    assert (tmp_path / "out.partial" / moments_name(LAYERS - 1)).is_file()
    run(source, tmp_path / "out", objective="loss", resumed=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_damaged_file_of_the_pass_is_named(source, tmp_path, monkeypatch):
    killed_after(2, source, tmp_path / "out", monkeypatch)
    path = tmp_path / "out.partial" / "states-00001.bf16"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"states-00001\.bf16"):
        run(source, tmp_path / "out", objective="loss", resumed=True)


def test_inner_gradients_are_the_outputs_gradients_times_both_slopes():
    generator = torch.Generator().manual_seed(2)
    w1, w3 = (torch.randn(6, 4, generator=generator) for _ in range(2))
    w2 = torch.randn(4, 6, generator=generator)
    x, g = torch.randn(50, 4, generator=generator), torch.randn(4, generator=generator)
    inner = InnerGradients(Dense(w1), Dense(w2), Dense(w3), torch.nn.functional.silu)
    inner.add(x, torch.full((50,), 0.5))
    of_w1, of_w3 = inner.of_outputs(torch.outer(g, g))  # every token has the same gradient
    a, b = (x @ w1.T).requires_grad_(), (x @ w3.T).requires_grad_()
    y = (torch.nn.functional.silu(a) * b) @ w2.T
    for found, grad in zip(
        (of_w1, of_w3), torch.autograd.grad(y @ g, (a, b), torch.ones(50)), strict=True
    ):
        torch.testing.assert_close(found, 0.5 * grad.T @ grad, rtol=1e-4, atol=1e-4)

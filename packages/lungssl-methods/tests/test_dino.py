import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from lungssl_data.batch import PairBatch
from lungssl_methods.dino import Dino
from lungssl_methods.losses import dino_loss, teacher_entropy, teacher_probs
from lungssl_methods.pairing import pair_weight
from lungssl_methods.schedules import cosine_momentum
from torch import nn

MakeBatch = Callable[..., PairBatch]


def _config(**changes: object) -> Dino.Config:
    return Dino.Config(**({"prototypes": 32, "head_hidden": 16, "head_bottleneck": 8} | changes))  # pyright: ignore


def _teacher_of(method: Dino) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in method.state_dict().items() if "teacher" in name}


def test_the_teacher_starts_as_a_copy_without_gradients(encoder: nn.Module) -> None:
    method = _config().build(encoder, total_steps=10)
    for student, teacher in (
        (method.encoder, method.teacher_encoder),
        (method.summary.student, method.summary.teacher),
    ):
        assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))
        assert not any(p.requires_grad for p in teacher.parameters())


# T7


def test_with_a_constant_student_the_teacher_follows_the_closed_form(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = _config(momentum=0.9).build(encoder, total_steps=6)
    start = _teacher_of(method)
    with torch.no_grad():
        for parameter in [*method.encoder.parameters(), *method.summary.student.parameters()]:
            parameter.add_(torch.randn_like(parameter))
    batch, product = make_batch(2), 1.0
    for step in range(5):
        method(batch, step)
        method.after_optimizer_step(step)
        product *= cosine_momentum(step, base=0.9, total_steps=6)
    for name, teacher in method.teacher_encoder.named_parameters():
        student = method.encoder.get_parameter(name)
        expected = student + (start[f"teacher_encoder.{name}"] - student) * product
        torch.testing.assert_close(teacher.detach(), expected.detach(), rtol=1e-6, atol=1e-6)


def test_at_momentum_one_no_bit_of_the_teachers_parameters_moves(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = _config(momentum=1.0).build(encoder, total_steps=10)
    start = _teacher_of(method)
    with torch.no_grad():
        method.summary.student.prototypes.add_(1.0)
    method(make_batch(2), 0)
    method.after_optimizer_step(0)
    parameters = {f"teacher_encoder.{n}" for n, _ in method.teacher_encoder.named_parameters()}
    assert all(torch.equal(start[name], method.state_dict()[name]) for name in parameters)
    assert torch.equal(start["summary.teacher.prototypes"], method.summary.teacher.prototypes)


def test_the_teacher_averages_students_from_after_the_optimizers_step(
    encoder: nn.Module, make_batch: MakeBatch
) -> None:
    method = _config(momentum=0.75, freeze_prototypes=0.0).build(encoder, total_steps=10)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.5)
    bias = method.encoder.get_parameter("embed.bias")
    teacher = bias.detach().clone()
    for step in range(2):
        method(make_batch(2), step).loss.backward()
        before = bias.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(before, bias)
        method.after_optimizer_step(step)
        momentum = cosine_momentum(step, base=0.75, total_steps=10)
        teacher = momentum * teacher + (1 - momentum) * bias.detach()
        torch.testing.assert_close(method.teacher_encoder.get_parameter("embed.bias"), teacher)


def test_the_teachers_buffers_are_copies(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = _config().build(encoder, total_steps=10)
    method(make_batch(2), 0)
    assert method.teacher_encoder.get_buffer("seen").item() == 0  # the teacher is in eval mode and counts nothing
    method.after_optimizer_step(0)
    assert method.teacher_encoder.get_buffer("seen").item() == method.encoder.get_buffer("seen").item() == 12


# T4 in the method


def test_the_centre_is_used_before_it_moves_and_moves_once_per_step(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = _config(pairs="all").build(encoder, total_steps=10)
    batches = [make_batch(2, locals_per_slot=0), make_batch(5, locals_per_slot=0)]
    logits = []
    for batch in batches:
        method.summary.centre.fill_(0.01)
        expected = method(batch, 0).loss
        again = method.eval()(batch, 0)
        method.train()
        # held out: the same centre, but the final temperature and nothing counted
        assert again.metrics["teacher_temperature"].item() == pytest.approx(0.06)
        assert again.loss.item() != expected.item()
        embeddings = [method.teacher_encoder(view.image).embedding() for view in batch.views]
        logits.append(method.summary.teacher(torch.stack(embeddings), method.summary.moments).flatten(0, 1))
        assert torch.equal(method.summary.centre, torch.full_like(method.summary.centre, 0.01))
    method.after_optimizer_step(0)
    mean = torch.cat(logits).mean(0)  # over the accumulated micro-batches of 2 and 5 samples
    torch.testing.assert_close(method.summary.centre, 0.9 * 0.01 + 0.1 * mean)


def test_the_loss_is_that_of_its_parts_for_one_view_per_forward(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = _config(pairs="cross").build(encoder, total_steps=10)
    batch = make_batch(3, locals_per_slot=1)
    output = method(batch, 0)

    def logits(model: nn.Module, head: nn.Module, index: int) -> torch.Tensor:
        return head(model(batch.views[index].image).embedding()[None], method.summary.moments)[0]

    terms = []
    for s, view in enumerate(batch.views):
        for t in range(2):
            if view.slot != batch.views[t].slot:
                target = logits(method.teacher_encoder, method.summary.teacher, t)
                probs = teacher_probs(target, torch.zeros(32), 0.04)
                student = torch.log_softmax(logits(method.encoder, method.summary.student, s) / 0.1, -1)
                terms.append(-(probs * student).sum(-1).mean())
    assert output.loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)
    assert output.metrics["loss_lnk"].item() == pytest.approx(output.loss.item() / math.log(32), rel=1e-6)


def test_loss_metrics_and_centre_are_those_of_the_logits_in_full(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = _config(prototypes=515).build(encoder, total_steps=10)
    batch = make_batch(5)
    method(batch, 0)
    method.after_optimizer_step(0)  # from here on the centre is not 0
    output = method(batch, 5)
    output.loss.backward()
    found = [parameter.grad for parameter in method.summary.student.parameters()]
    moved = method.summary._logit_sum.clone()

    def embeddings(model: nn.Module, views: int) -> torch.Tensor:
        return torch.stack([model(view.image).embedding() for view in batch.views[:views]])

    method.zero_grad()
    with torch.no_grad():
        logits = method.summary.teacher(embeddings(method.teacher_encoder, 2), method.summary.moments)
        probs = teacher_probs(logits, method.summary.unbiased_centre(), method.teacher_temperature(5))
    weight = pair_weight(batch, "all")
    student = method.summary.student(embeddings(method.encoder, len(batch.views)), method.summary.moments)
    loss = dino_loss(student, probs, weight, student_temperature=0.1)
    loss.backward()
    entropy = ((weight.sum(0) / weight.sum()) * teacher_entropy(probs)).sum()
    ln_k = math.log(515)
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert output.metrics["teacher_entropy_lnk"].item() == pytest.approx(entropy.item() / ln_k, rel=1e-5)
    assert output.metrics["teacher_kl_lnk"].item() == pytest.approx((loss - entropy).item() / ln_k, rel=1e-5)
    torch.testing.assert_close(moved, logits.sum((0, 1)), rtol=1e-5, atol=1e-5)
    for parameter, gradient in zip(method.summary.student.parameters(), found, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-7)


def test_prototypes_used_is_the_perplexity_of_the_mean_target_held_out(
    encoder: nn.Module, make_batch: MakeBatch
) -> None:
    method = _config().build(encoder, total_steps=10)
    batch = make_batch(5)
    assert "prototypes_used" not in method(batch, 0).metrics
    method.after_optimizer_step(0)  # a centre that is not zero
    method.eval()
    used = method(batch, 1).metrics["prototypes_used"]
    with torch.no_grad():
        embeddings = torch.stack([method.teacher_encoder(view.image).embedding() for view in batch.global_views()])
        logits = method.summary.teacher(embeddings, method.summary.moments)
    targets = teacher_probs(logits, method.summary.unbiased_centre(), method.teacher_temperature(1)).flatten(0, 1)
    mean = targets.mean(dim=0)
    torch.testing.assert_close(used, (-(mean * mean.log()).sum()).exp())
    assert 1 < float(used) <= 32


def test_views_of_one_size_share_a_forward_and_the_teacher_sees_only_global_ones(
    encoder: nn.Module, make_batch: MakeBatch
) -> None:
    method = _config().build(encoder, total_steps=10)
    method(make_batch(3), 0)
    assert method.encoder.calls == [(6, 1, 8, 12, 16), (12, 1, 4, 8, 4)]
    assert method.teacher_encoder.calls == [(6, 1, 8, 12, 16)]


def test_frozen_prototypes_get_a_zero_gradient_and_then_a_real_one(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = _config(freeze_prototypes=0.2).build(encoder, total_steps=10)
    batch = make_batch(2)
    for step, moves in ((0, False), (1, False), (2, True)):
        method.zero_grad()
        method(batch, step).loss.backward()
        assert method.summary.student.prototypes.grad is not None
        assert bool((method.summary.student.prototypes.grad != 0).any()) is moves


def test_logits_are_cosines_in_float32_even_under_autocast(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = _config().build(encoder, total_steps=10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = method.summary.student(torch.randn(2, 3, 12) * 100, method.summary.moments)
        loss = method(make_batch(2), 0).loss
    assert logits.dtype == loss.dtype == torch.float32
    assert logits.abs().max() <= 1 + 1e-6


def test_prototypes_count_by_direction_only(encoder: nn.Module) -> None:
    method = _config().build(encoder, total_steps=10)
    head, embedding = method.summary.student, torch.randn(1, 3, 12)
    before = head(embedding, method.summary.moments)
    head.prototypes.data *= torch.rand(32, 1) + 0.5
    torch.testing.assert_close(head(embedding, method.summary.moments), before)


def test_temperature_and_momentum_at_their_corners(encoder: nn.Module) -> None:
    method = _config(momentum=0.9).build(encoder, total_steps=101)
    assert [method.teacher_temperature(s) for s in (0, 15, 30, 100)] == pytest.approx([0.04, 0.05, 0.06, 0.06])
    assert [method.momentum(s) for s in (0, 50, 100)] == pytest.approx([0.9, 0.95, 1.0])
    assert method.eval().teacher_temperature(0) == 0.06
    auto = _config().build(encoder, total_steps=200, effective_batch=16)
    assert auto.momentum(0) == 0.95  # a half-life of 13.5 steps, twice the centre's


def test_a_run_resumed_from_its_state_continues_bit_for_bit(make_batch: MakeBatch, encoder: nn.Module) -> None:
    batches = [make_batch(2) for _ in range(6)]

    def train(method: Dino, first: int, last: int) -> None:
        for step in range(first, last):
            torch.manual_seed(step)
            method.zero_grad()
            method(batches[step], step).loss.backward()
            with torch.no_grad():
                for parameter in method.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
            method.after_optimizer_step(step)

    whole = _config().build(copy.deepcopy(encoder), total_steps=6)
    start = copy.deepcopy(whole.state_dict())
    train(whole, 0, 6)
    first = _config().build(copy.deepcopy(encoder), total_steps=6)
    first.load_state_dict(start)
    train(first, 0, 3)
    second = _config().build(copy.deepcopy(encoder), total_steps=6)
    second.load_state_dict(first.state_dict())
    train(second, 3, 6)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in whole.state_dict().items())
    assert (whole.summary.centre != 0).any()


def test_exports_the_teacher(encoder: nn.Module) -> None:
    method = _config().build(encoder, total_steps=10)
    assert method.export_encoder() is method.teacher_encoder


@pytest.mark.parametrize(
    ("pairs", "globals_per_slot", "locals_per_slot", "fits"),
    [
        ("all", 1, 0, True),
        ("cross", 1, 0, True),
        ("within", 1, 1, True),
        ("within", 2, 0, True),
        ("within", 1, 0, False),
        ("all", 0, 2, False),
    ],
)
def test_views_are_checked_against_the_policy(
    encoder: nn.Module, pairs: str, globals_per_slot: int, locals_per_slot: int, fits: bool
) -> None:
    method = _config(pairs=pairs).build(encoder, total_steps=10)
    if fits:
        method.check_views(globals_per_slot=globals_per_slot, locals_per_slot=locals_per_slot)
    else:
        with pytest.raises(ValueError, match=r"no student-teacher pair|at least 1 global view per slot"):
            method.check_views(globals_per_slot=globals_per_slot, locals_per_slot=locals_per_slot)


def test_a_constant_encoder_shows_as_zero_spread(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = _config().build(encoder, total_steps=10)
    assert method(make_batch(4), 0).metrics["embedding_std"].item() > 0.01
    with torch.no_grad():
        method.encoder.get_parameter("norm.weight").zero_()
        method.encoder.get_parameter("norm.bias").fill_(1.0)
    assert method(make_batch(4), 0).metrics["embedding_std"].item() == pytest.approx(0.0, abs=1e-6)


# T5 in the method, and the other optional terms


def test_ibots_term_is_that_of_the_hidden_tokens_alone(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = _config(patch_weight=1.0, mask_unit_tokens=1).build(encoder, total_steps=10)
    assert method.patches is not None
    batch = make_batch(2, locals_per_slot=0)
    torch.manual_seed(3)
    output = method(batch, 5)
    torch.manual_seed(3)
    mask = method._mask(batch.global_views())
    assert mask.any(dim=1).tolist().count(True) == 2  # half of 2 slots x 2 samples
    image = torch.cat([view.image for view in batch.views])
    with torch.no_grad():
        student = method.patches.student(method.encoder(image, mask=mask).tokens, method.patches.moments)
        logits = method.patches.teacher(method.teacher_encoder(image).tokens, method.patches.moments)
        probs = teacher_probs(logits, method.patches.unbiased_centre(), method.teacher_temperature(5))
        each = -(probs * torch.log_softmax(student / 0.1, -1)).sum(-1)
        terms = torch.stack([each[row][mask[row]].mean() for row in range(4) if mask[row].any()])
    assert output.metrics["patch_loss_lnk"].item() == pytest.approx(terms.mean().item() / math.log(32), rel=1e-5)
    summary = output.metrics["loss_lnk"].item() * math.log(32)
    assert output.loss.item() == pytest.approx(summary + terms.sum().item() / 4, rel=1e-5)


def test_ibots_term_moves_its_own_head_and_centre(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = _config(patch_weight=1.0, mask_unit_tokens=1).build(encoder, total_steps=10)
    assert method.patches is not None
    with (
        torch.no_grad()
    ):  # at its start of 0 the tiny encoder's hidden tokens are 0, and so is their cosine to anything
        method.encoder.get_parameter("mask_token").normal_()
    method(make_batch(2), 5).loss.backward()
    assert method.patches.student.prototypes.grad is not None and method.patches.student.prototypes.grad.any()
    assert method.encoder.get_parameter("mask_token").grad is not None
    teacher = method.patches.teacher.prototypes.clone()
    with torch.no_grad():
        method.patches.student.prototypes.add_(1.0)
    method.after_optimizer_step(0)
    assert method.patches.centre.any() and not torch.equal(teacher, method.patches.teacher.prototypes)


def test_sinkhorn_targets_share_the_prototypes_out_whatever_the_teacher_says(
    encoder: nn.Module, make_batch: MakeBatch
) -> None:
    small = _config().build(encoder, total_steps=10, effective_batch=127)
    large = _config().build(encoder, total_steps=10, effective_batch=128)
    assert (small.summary.config.centering, large.summary.config.centering) == ("ema", "sinkhorn")
    with torch.no_grad():  # a teacher that says the same of every crop
        large.teacher_encoder.get_parameter("norm.weight").zero_()
    entropy = large(make_batch(4), 0).metrics["teacher_entropy_lnk"].item()
    assert entropy == pytest.approx(1.0, abs=1e-3)


def test_koleo_counts_from_sixteen_patients_on(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = _config(koleo_weight=0.1).build(encoder, total_steps=10)
    assert "koleo" not in method(make_batch(15, locals_per_slot=0), 0).metrics
    output = method(make_batch(16, locals_per_slot=0), 0)
    summary = output.metrics["loss_lnk"].item() * math.log(32)
    assert output.loss.item() == pytest.approx(summary + 0.1 * output.metrics["koleo"].item(), rel=1e-5)


def test_gram_anchoring_begins_with_the_second_part_and_keeps_an_earlier_teacher(
    encoder: nn.Module, make_batch: MakeBatch
) -> None:
    method = _config(gram_weight=2.0, gram_refresh=0.2, momentum=0.5).build(encoder, total_steps=10)
    assert method.anchor is not None
    with torch.no_grad():
        method.encoder.get_parameter("embed.weight").add_(0.5)
    for step in range(2):
        assert "gram" not in method(make_batch(2), step).metrics
        method.after_optimizer_step(step)
    anchor = method.anchor.get_parameter("embed.weight").clone()
    torch.testing.assert_close(anchor, method.teacher_encoder.get_parameter("embed.weight"))
    output = method(make_batch(2), 2)
    assert output.metrics["gram"] > 0
    method.after_optimizer_step(2)
    assert torch.equal(anchor, method.anchor.get_parameter("embed.weight"))
    assert not torch.equal(anchor, method.teacher_encoder.get_parameter("embed.weight"))


def _padded(batch: PairBatch, fill: float, *, sample: int = 1) -> PairBatch:
    """All of a sample's views fell into padding, which holds `fill`."""
    views = []
    for view in batch.views:
        image, valid = view.image.clone(), view.valid.clone()
        image[sample], valid[sample] = fill * torch.linspace(-1, 1, image[sample].numel()).view_as(image[sample]), False
        views.append(replace(view, image=image, valid=valid))
    return replace(batch, views=tuple(views))


@pytest.mark.parametrize("centering", ["ema", "sinkhorn"])
def test_what_was_not_measured_moves_no_loss_target_centre_or_neighbour(
    centering: str, encoder: nn.Module, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lungssl_methods.dino.KOLEO_FROM_PATIENTS", 3)
    weights = {"koleo_weight": 0.1, "gram_weight": 1.0, "gram_refresh": 0.1, "patch_weight": 1.0}
    whole = make_batch(4)
    found = []
    for fill in (0.0, 1.0):
        torch.manual_seed(0)
        method = _config(centering=centering, mask_unit_tokens=1, mask_share=1.0, **weights).build(
            copy.deepcopy(encoder), total_steps=10
        )
        with torch.no_grad():  # student, teacher and anchor differ
            method.encoder.get_parameter("embed.weight").add_(0.1 * torch.ones(()))
        for step in range(2):
            torch.manual_seed(step)
            output = method(_padded(whole, fill), step)
            method.after_optimizer_step(step)
        torch.manual_seed(2)
        output = method(_padded(whole, fill), 5)
        moved = {name: value for name, value in method.state_dict().items() if "centre" in name or "total" in name}
        held_out = method.eval()(_padded(whole, fill), 5).metrics
        found.append({**output.metrics, **moved, **{f"held_out_{name}": value for name, value in held_out.items()}})
    first, second = found
    assert {"koleo", "gram", "patch_loss_lnk", "held_out_prototypes_used", "patches.centre"} <= first.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-6, atol=1e-7, msg=lambda text, name=name: name + text)


def test_a_tokens_patch_term_needs_a_measured_voxel(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = _config(patch_weight=1.0, mask_unit_tokens=1, mask_share=1.0).build(encoder, total_steps=10).eval()
    nn.init.normal_(method.encoder.get_parameter("mask_token"))  # or the student is uniform, whatever the teacher says
    batch = make_batch(2, locals_per_slot=0)
    views = tuple(replace(view, valid=view.valid.clone()) for view in batch.views)
    for view in views:
        view.valid[:, :, :, 8:] = False  # half of the tokens

    def loss(fill: float) -> float:
        for view in views:
            view.image[:, :, :, :, 8:] = fill
        return method(replace(batch, views=views), 5).metrics["patch_loss_lnk"].item()

    assert loss(0.0) == pytest.approx(loss(1.0), rel=1e-6)


@pytest.mark.parametrize("centering", ["ema", "sinkhorn"])
def test_a_batch_of_padding_costs_zero_with_a_gradient_of_zero_and_moves_nothing(
    centering: str, encoder: nn.Module, make_batch: MakeBatch
) -> None:
    method = _config(centering=centering, patch_weight=1.0, mask_unit_tokens=1).build(encoder, total_steps=10)
    batch = make_batch(2)
    empty = tuple(replace(view, valid=torch.zeros_like(view.valid)) for view in batch.views)
    output = method(replace(batch, views=empty), 5)
    output.loss.backward()
    assert output.loss.item() == 0.0 and all(torch.isfinite(value) for value in output.metrics.values())
    gradients = [p.grad for p in method.summary.student.parameters()]
    assert all(grad is not None and not grad.any() for grad in gradients)
    before = method.summary.centre.clone()
    method.after_optimizer_step(5)
    assert torch.equal(method.summary.centre, before) and not method.summary.embedding_moments.weight().item()


@pytest.mark.parametrize("momentum", [1.0, -0.1, float("nan")])
def test_a_centre_that_would_never_move_is_refused(encoder: nn.Module, momentum: float) -> None:
    with pytest.raises(ValueError, match="centre_momentum must be at least 0 and below 1"):
        _config(centre_momentum=momentum).build(encoder, total_steps=10)

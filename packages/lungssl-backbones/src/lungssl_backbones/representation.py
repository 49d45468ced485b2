"""Figures that judge features without labels. Pure functions of tensors; all computed in float64.

Axes: n samples, d embedding, q queries, c candidates, p patients, v views.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """How often a patient's other phase is found; chance is `1 / n` and `min(5, n) / n`.

    A shortcut (ribs, tubes, table) finds patients as well as their lungs do: `ssl.md` C1.
    """

    top1: float
    top5: float
    mrr: float
    """Mean reciprocal rank."""
    n: int


def rankme(features: Float[Tensor, "n d"], *, eps: float = 1e-7) -> float:
    """RankMe: how many dimensions the features spread over, from 0 or 1 (collapsed) to min(n, d).

    exp(-Σ p log p) with p = σ/Σσ + eps over the singular values σ of the uncentred features; eps is the paper's for
    float32. Garrido et al. 2023, https://arxiv.org/abs/2210.02885. It counts a large common mean as one dimension:
    compare only runs of one method with equal n. All-zero features give 0.
    """
    sigma = torch.linalg.svdvals(features.double())
    return _exp_entropy(sigma, eps) if sigma.sum() > 0 else 0.0


def effective_rank(features: Float[Tensor, "n d"]) -> float:
    """Effective rank of the centred features: exp(-Σ p log p) with p = σ/Σσ over their singular values σ.

    Roy & Vetterli 2007, EUSIPCO, "The effective rank", https://ieeexplore.ieee.org/document/7098875. Unlike `rankme`
    it is blind to the mean. Rows that are equal within float32 rounding give 0.
    """
    values = features.double()
    sigma = torch.linalg.svdvals(values - values.mean(dim=0))
    # float32 rounding leaves 1e-7 of the values, so 1e-14 of their energy, in the differences of equal rows.
    collapsed = sigma.square().sum() <= 1e-12 * values.square().sum()
    return 0.0 if collapsed else _exp_entropy(sigma, 0.0)


def paired_retrieval(exhale: Float[Tensor, "n d"], inhale: Float[Tensor, "n d"]) -> Retrieval:
    """Find each exhale row's patient among all inhale rows by cosine similarity; row i of both is one patient.

    Ties count as misses, so that collapsed features score 0 and not 1.
    """
    ranks = retrieval_ranks(exhale, inhale)
    mrr = (1.0 / ranks.double()).mean().item()
    return Retrieval(top1=_share(ranks <= 1), top5=_share(ranks <= 5), mrr=mrr, n=len(ranks))


def retrieval_ranks(exhale: Float[Tensor, "n d"], inhale: Float[Tensor, "n d"]) -> Int64[Tensor, " n"]:
    """Of each exhale row's own patient among all inhale rows by cosine similarity, from 1; ties go to the others."""
    similarity = _unit(exhale) @ _unit(inhale).T
    return (similarity >= similarity.diagonal()[:, None]).sum(dim=1)


def off_diagonal_cosine(features: Float[Tensor, "n d"]) -> float:
    """Mean cosine of different rows: 1 where all look alike, about 0 for spread ones. NaN for a single row."""
    rows = _unit(features)
    n = len(rows)
    return float((rows.sum(0).square().sum() - rows.square().sum()) / (n * (n - 1)))


def phase_auc(features: Float[Tensor, "n d"], inhale: Bool[Tensor, " n"], patient: Int64[Tensor, " n"]) -> float:
    """How well a linear probe tells phases of patients it wasn't fitted to: area under the ROC curve, 0.5 is chance.

    The scores of `phase_scores`, ranked together. 1 means that the phase is written into the embedding.

    Raises ValueError without scans of both phases.
    """
    scores = phase_scores(features, inhale, patient)
    first, second = scores[inhale], scores[~inhale]
    if not len(first) or not len(second):
        raise ValueError(f"phase_auc needs scans of both phases, got {len(first)} inhale and {len(second)} exhale")
    above = (first[:, None] > second).double() + 0.5 * (first[:, None] == second).double()
    return float(above.mean())


def phase_scores(
    features: Float[Tensor, "n d"], inhale: Bool[Tensor, " n"], patient: Int64[Tensor, " n"]
) -> Float64[Tensor, " n"]:
    """What a linear probe says of each scan's phase, fitted to the other patients; larger for inhale.

    Ridge regression without intercept on standardised features, with the penalty n, each patient left out in turn.
    """
    x = features.double()
    x = (x - x.mean(0)) / x.std(0, correction=0).clamp_min(1e-12)
    y = inhale.double() * 2 - 1
    scores = torch.empty(len(x), dtype=torch.float64)
    for one in patient.unique():
        out = patient == one
        kernel = x[~out] @ x[~out].T + (~out).sum() * torch.eye(int((~out).sum()), dtype=torch.float64)
        target = y[~out] - y[~out].mean()
        scores[out] = x[out] @ (x[~out].T @ torch.linalg.solve(kernel, target))
    return scores


def linear_cka(first: Float[Tensor, "n d"], second: Float[Tensor, "n e"]) -> float:
    """How alike two encoders' features of the same samples are, whatever their rotation and scale: 0 to 1.

    ||Y'X||^2 / (||X'X|| ||Y'Y||) of centred features, Frobenius norms. Kornblith et al. 2019,
    https://arxiv.org/abs/1905.00414. NaN where one of them is constant. It tends to 1 where n is below d: give more
    samples than dimensions.
    """
    x, y = (values.double() - values.double().mean(dim=0) for values in (first, second))
    return float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def lidar(features: Float[Tensor, "p v d"], *, delta: float = 1e-4) -> float:
    """LiDAR: the effective rank of what tells p patients apart, beside how their v views or phases differ.

    exp(-Σ p log p) over the eigenvalues of S_w^-1/2 S_b S_w^-1/2, S_b the covariance of the patients' means and S_w
    that of the views about them plus `delta` I. Thilak et al. 2023, https://arxiv.org/abs/2312.04000; `delta` as there.
    At most min(p - 1, d). Raises ValueError for fewer than 2 patients or views.
    """
    patients, views, width = features.shape
    if patients < 2 or views < 2:
        raise ValueError(f"lidar needs 2 patients with 2 views each, got {patients} and {views}")
    x = features.double()
    means = x.mean(dim=1)
    within = (x - means[:, None]).flatten(0, 1)
    between = means - means.mean(dim=0)
    s_w = within.T @ within / (patients * (views - 1)) + delta * torch.eye(width, dtype=torch.float64)
    s_b = between.T @ between / (patients - 1)
    values, vectors = torch.linalg.eigh(s_w)
    root = vectors / values.sqrt() @ vectors.T
    spread = torch.linalg.eigvalsh(root @ s_b @ root).clamp_min(0.0)
    return _exp_entropy(spread, 0.0) if spread.sum() > 0 else 0.0


def knn_labels(
    queries: Float[Tensor, "q d"],
    known: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> Int64[Tensor, " q"]:
    """Label of each query by its k nearest known samples, each voting with exp(cosine / temperature).

    Wu et al. 2018, https://arxiv.org/abs/1805.01978; k and temperature as in DINO's evaluation (Caron et al. 2021).
    Raises ValueError where fewer than k samples are known.
    """
    if not 1 <= k <= len(known):
        raise ValueError(f"k must be 1 to the {len(known)} known samples, got {k}")
    cosine, nearest = (_unit(queries) @ _unit(known).T).topk(k, dim=1)
    votes = torch.zeros(len(queries), int(labels.max()) + 1, dtype=torch.float64)
    votes.scatter_add_(1, labels[nearest], ((cosine - 1.0) / temperature).exp())  # the largest is 1: no overflow
    return votes.argmax(dim=1)


def alignment(first: Float[Tensor, "n d"], second: Float[Tensor, "n d"]) -> float:
    """Mean squared distance of unit features that should agree; row i of both is one sample. 0 to 4.

    Wang & Isola 2020, https://arxiv.org/abs/2005.10242.
    """
    return float((_unit(first) - _unit(second)).square().sum(dim=1).mean())


def uniformity(features: Float[Tensor, "n d"]) -> float:
    """Logarithm of the mean of exp(-2 squared distance) over pairs of different unit features: 0 where all are one.

    Wang & Isola 2020, as `alignment`. NaN for a single row.
    """
    distance = torch.pdist(_unit(features))
    return float((-2.0 * distance.square()).exp().mean().log())


def landmark_error_mm(
    queries: Float[Tensor, "q d"],
    candidates: Float[Tensor, "c d"],
    *,
    candidates_mm: Float[Tensor, "c 3"],
    truth_mm: Float[Tensor, "q 3"],
) -> Float64[Tensor, " q"]:
    """Distance in mm from the candidate most similar (cosine) to each query, to where the query's landmark truly is.

    `queries` are features at the landmarks of one phase, `candidates` features all over the other one's lung,
    `truth_mm` the landmarks in that other phase. Nothing regularises the match; candidates on a grid of pitch s cannot
    do better than about s/2 on average. Compare with the distances to `truth_mm` of the same positions, unmoved.
    """
    best = (_unit(queries) @ _unit(candidates).T).argmax(dim=1)
    return (candidates_mm.double()[best] - truth_mm.double()).norm(dim=1)


def pca_colours(
    features: Float[Tensor, "n d"], *, fit_on: Float[Tensor, "m d"] | None = None
) -> Float64[Tensor, "n 3"]:
    """RGB in [0, 1] from the first three principal components, as in the figures of DINOv2 (Oquab et al. 2023).

    Components and range (1st to 99th percentile, clipped) come from `fit_on`. Give it the tokens of both phases
    together and colour each phase with it: then the same anatomy has the same colour, if the features agree. A
    component's sign is fixed by its largest loading, so that equal features give equal pictures.

    Raises ValueError for fewer than 3 dimensions or 2 rows to fit on.
    """
    basis = (features if fit_on is None else fit_on).double()
    if basis.shape[1] < 3 or len(basis) < 2:
        raise ValueError(f"pca_colours needs 2 rows and 3 dimensions to fit on, got {tuple(basis.shape)}")
    mean = basis.mean(dim=0)
    centred = basis - mean
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -3:].flip(1)
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    axes = axes * largest.sign()
    projected = centred @ axes
    low, high = (_percentile(projected, share) for share in (0.01, 0.99))
    span = (high - low).clamp_min(torch.finfo(torch.float64).tiny)
    return (((features.double() - mean) @ axes - low) / span).clamp(0, 1)


def _exp_entropy(weights: Float64[Tensor, " k"], eps: float) -> float:
    p = weights / weights.sum() + eps
    return torch.special.entr(p).sum().exp().item()


def _unit(features: Float[Tensor, "n d"]) -> Float64[Tensor, "n d"]:
    return F.normalize(features.double(), dim=1)


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()


def _percentile(columns: Float64[Tensor, "m k"], share: float) -> Float64[Tensor, " k"]:
    """By sorting: torch.quantile refuses more than 2**24 values."""
    return columns.sort(dim=0).values[round(share * (len(columns) - 1))]

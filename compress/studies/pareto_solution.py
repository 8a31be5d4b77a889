"""A classifier of feature rows under a parameter limit: one standalone file that needs only PyTorch 2.2 or newer.

The solution knows nothing about the data but the rows. Four families of candidates, the simplest first:

    Centres, K = 1   class means with one shrunk covariance, of low rank if the limit demands it; closed form
    Centres, K > 1   the same with several cluster means a class; k-means, then closed form
    Radial           ridge regression on Gaussian bumps around cluster means; closed form
    Network          a residual MLP on mixed and noisy rows, distilled from an ensemble of the best closed forms

Stratified cross-validation chooses. Closed forms race: after each fold the worse half drops out. Networks run a short heat
first. A candidate replaces a simpler one only if it is better by more than two standard errors of the paired difference.

Annotations are not strings: dataclasses would look up their module in sys.modules, where a file loaded by path is missing.
"""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FOLDS, SEED = 5, 2025
CLEARLY, FEWEST = 2.0, 4  # standard errors between distinct candidates; minimum number of candidates in a race
FIT_MACS, PADDED = 2e9, 5e7  # of one mixture or radial fit, about a second; size of the padded array of k-means
TRAINING_MACS, MOST_STEPS, BATCH = 3e10, 600, 128  # of one network, some seconds
NETWORK_SIZE = 300_000  # larger networks learn too little within TRAINING_MACS
BLOCKS, HEAT, HOPELESS = 2, 8, 10  # a heat has 1/8 of the steps; the limit is 10 times the errors of the leader
NOISE, LISTEN = 0.3, 0.9  # in standard deviations of each feature; weight of the teachers in the targets of a network


class Weights(nn.Module):
    """A module that holds all its numbers as trainable float32 parameters, which count against the limit."""
    shift: Tensor
    scale: Tensor
    centres: Tensor
    weight: Tensor
    bias: Tensor
    down: Tensor

    def __init__(self, **values: Tensor) -> None:
        super().__init__()
        for name, value in values.items():
            setattr(self, name, nn.Parameter(value.detach().float().contiguous().clone()))


class Scaled(Weights):
    """(x - shift) scale; exact even for features with a large offset."""
    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs - self.shift) * self.scale


class CentreHead(Weights):
    """(N, D) -> (N, C): logit_c = log sum_k exp(w_ck . (x - shift) + b_ck), K Gaussians a class with one covariance.

    The terms in x^2 are equal and cancel. The weights are one factor (D, C K), or (D, R) and (R, C K); biases are (C, K).
    Source: Hastie and Tibshirani 1996, "Discriminant Analysis by Gaussian Mixtures"; linear discriminants if K = 1.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs - self.shift
        hidden = hidden @ self.down if hasattr(self, "down") else hidden
        return ((hidden @ self.weight).unflatten(1, self.bias.shape) + self.bias).logsumexp(2)  # type: ignore[no-any-return]


class Bumps(Weights):
    """Gaussian bumps around M centres, then a linear layer: exp(-|z - centre_m|^2) W + b."""

    def forward(self, inputs: Tensor) -> Tensor:
        return bumps(inputs, self.centres) @ self.weight + self.bias


class Residual(nn.Sequential):
    """x + f(x)."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + super().forward(inputs)  # type: ignore[no-any-return,no-untyped-call]


def bumps(rows: Tensor, centres: Tensor) -> Tensor:
    """Return exp(-squared distance): (N, D) and (M, D) -> (N, M)."""
    return torch.exp(-(rows.square().sum(1)[:, None] + centres.square().sum(1) - 2 * rows @ centres.T).clamp(min=0))


@dataclass(eq=False)
class Rows:
    """Labelled rows, (N, D) float32 and (N,) int64, and statistics that several candidates share."""
    inputs: Tensor
    labels: Tensor
    num_classes: int

    def __post_init__(self) -> None:
        self._known: dict[tuple[str, int], tuple[Tensor, Tensor, Tensor]] = {}
        rows = self.inputs.double()
        self.shift = rows.mean(0).float()
        spread = (rows - self.shift.double()).square().mean(0).sqrt()
        varies = spread > 1e-6 * self.shift.abs() + 1e-30  # a constant feature gets weight 0
        one = (1 / spread.square().mean().sqrt().clamp(min=1e-30)).expand_as(spread)
        self.scales = {"one": one.float(), "each": torch.where(varies, 1 / spread.clamp(min=1e-30), 0.0).float()}
        self.counts = torch.bincount(self.labels, minlength=self.num_classes).float()

    def scaled(self, units: str) -> Tensor:
        """Return (N, D) with mean zero, and with variance 1 on average ("one") or for each feature ("each")."""
        return (self.inputs - self.shift) * self.scales[units]

    def clusters(self, units: str, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return cluster means (C, K, D), sizes (C, K) and the float64 covariance (D, D) within clusters (else total)."""
        if (units, number) not in self._known:
            rows = self.scaled(units)
            means, sizes = k_means(rows, self.labels, self.counts, number)
            within, total = len(rows) - int((sizes > 0).sum()), rows.double().T @ rows.double()
            total.diagonal().add_(1e-6 * total.trace())  # larger than the rounding error of the difference below
            between = (means.double() * sizes[..., None]).flatten(0, 1).T @ means.double().flatten(0, 1)
            self._known[units, number] = means, sizes, (total - between) / within if within else total / len(rows)
        return self._known[units, number]


def k_means(rows: Tensor, labels: Tensor, counts: Tensor, number: int, rounds: int = 8) -> tuple[Tensor, Tensor]:
    """Return K means of each class, and sizes, 0 for missing rows. Source: Arthur and Vassilvitskii 2007, "k-means++"."""
    if number == 1:
        total = torch.zeros(len(counts), rows.shape[1], device=rows.device).index_add_(0, labels, rows)
        return (total / counts.clamp(min=1)[:, None])[:, None], counts[:, None]
    classes, most = torch.arange(len(counts), device=rows.device), int(counts.max())
    order = labels.argsort(stable=True)
    place = torch.arange(len(labels), device=rows.device) - (counts.cumsum(0) - counts).long()[labels[order]]
    padded = rows.new_zeros(len(counts), most, rows.shape[1])
    padded[labels[order], place] = rows[order]
    real = (torch.arange(most, device=rows.device) < counts[:, None]).float()  # (C, most)
    if number >= most:  # every row is a cluster
        return F.pad(padded, (0, 0, 0, number - most)), F.pad(real, (0, number - most))
    generator, starts, distance = torch.Generator().manual_seed(SEED), [], real
    for _ in range(number):
        clock = torch.empty(len(counts), most).exponential_(generator=generator).to(rows.device).clamp(min=1e-9)
        draw = (distance.clamp(min=1e-12) / clock * real).argmax(1)  # a draw in proportion to the distance
        starts.append(padded[classes, draw])
        squares = (padded - starts[-1][:, None]).square().sum(2)
        distance = squares if len(starts) == 1 else torch.minimum(distance, squares)
    means = torch.stack(starts, 1)
    for _ in range(rounds):
        member = F.one_hot(torch.cdist(padded, means).argmin(2), number) * real[..., None]  # (C, most, K)
        sizes = member.sum(1)
        means = member.transpose(1, 2) @ padded / sizes.clamp(min=1)[..., None]
    return means, sizes


@dataclass(frozen=True, kw_only=True)
class Centres:
    """K Gaussians a class with one covariance."""
    number: int  # K
    units: str  # "one" scale for all features, or "each" its own scale
    shrinkage: float  # lambda in the covariance (1 - lambda) S + lambda mean(diag S) I
    equal: bool = False  # give all means one length, because with few rows the lengths differ mainly by noise
    rank: int = 0  # of the weights; 0 is full rank

    def size(self, rows: Rows) -> int:
        features, outputs = rows.inputs.shape[1], rows.num_classes * self.number
        return features + outputs + (self.rank * (features + outputs) if self.rank else features * outputs)

    def fit(self, rows: Rows) -> nn.Module:
        """Compute whitened means A = L^-1 m with L L^T = covariance, weights L^-T A, biases log frequency - |A|^2 / 2.

        Low rank keeps the directions in which the whitened means differ most.
        Source: Hastie, Tibshirani and Friedman 2009, "The Elements of Statistical Learning", sections 4.3.1 to 4.3.3.
        """
        means, sizes, covariance = rows.clusters(self.units, self.number)
        frequency = sizes.flatten().double() / sizes.sum()
        target = covariance.diagonal().mean().clamp(min=1e-12) * torch.eye(len(covariance)).to(covariance)
        root = torch.linalg.cholesky(torch.lerp(covariance, target, self.shrinkage))
        factors = [white := torch.linalg.solve_triangular(root, means.flatten(0, 1).T.double(), upper=False)]  # (D, C K)
        if self.rank:
            spread = white * frequency.sqrt()  # left singular vectors from the smaller Gram matrix
            left = len(spread) <= len(frequency)
            vectors = torch.linalg.eigh(spread @ spread.T if left else spread.T @ spread)[1][:, -self.rank:]
            basis = F.normalize(vectors if left else spread @ vectors, dim=0)
            factors = [basis, white := basis.T @ white]
        length = white.norm(dim=0)
        if self.equal:
            common = (frequency * length).sum()
            factors[-1], length = white * (common / length.clamp(min=1e-12)), common.expand_as(length)
        factors[0] = torch.linalg.solve_triangular(root.T, factors[0], upper=True) * rows.scales[self.units][:, None]
        bias = (frequency.clamp(min=1e-12).log() - length**2 / 2).view(sizes.shape)
        return CentreHead(shift=rows.shift, bias=bias, **dict(zip(("weight", "down"), factors[::-1], strict=False)))


@dataclass(frozen=True, kw_only=True)
class Radial:
    """Ridge regression of the class indicators on bumps around K cluster means of each class."""
    number: int  # K
    units: str
    narrowness: float  # divides the squared width of the bumps, which is the median squared distance at 1
    ridge: float  # penalty relative to the number of rows

    def size(self, rows: Rows) -> int:
        features, bases = rows.inputs.shape[1], int(rows.counts.clamp(max=self.number).sum())
        return 2 * features + bases * (features + rows.num_classes) + rows.num_classes

    def fit(self, rows: Rows) -> nn.Module:
        """Solve (P^T P + ridge N Q) W = P^T Y, bumps P at rows, Q at centres. Source: Rudi et al. 2015, "Less is More"."""
        means, sizes, _ = rows.clusters(self.units, self.number)
        inputs, centres = rows.scaled(self.units).double(), means[sizes > 0].double()  # not definite in float32
        typical = torch.cdist(inputs[:: max(1, len(inputs) // 500)], centres).square().median().clamp(min=1e-12)
        stretch = (self.narrowness / typical).sqrt()
        at_rows = bumps(inputs * stretch, centres * stretch)
        at_centres = bumps(centres * stretch, centres * stretch)
        system = at_rows.T @ at_rows + self.ridge * len(inputs) * at_centres
        system.diagonal().add_(1e-7 * system.diagonal().mean())
        frequency = rows.counts.double() / len(inputs)
        moments = at_rows.T @ (F.one_hot(rows.labels, rows.num_classes) - frequency)
        weight = torch.cholesky_solve(moments, torch.linalg.cholesky(system))
        # Regression gives values from 0 to 1; times 8, their softmax is near the probabilities that a student needs.
        scaled = Scaled(shift=rows.shift, scale=rows.scales[self.units] * stretch)
        return nn.Sequential(scaled, Bumps(centres=centres * stretch, weight=8 * weight, bias=8 * frequency))


@dataclass(frozen=True, kw_only=True)
class Network:
    """A residual MLP trained on rows mixed in pairs, with noise, so that no batch occurs twice.

    The targets are the mixed labels, or mostly the mean probabilities of the teachers, if there are any. The teachers are
    fitted to the same rows as the network, which keeps cross-validation honest.
    Source: Zhang et al. 2018, "mixup"; Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network".
    """
    width: int
    units: str
    teachers: tuple[Centres | Radial, ...] = ()  # closed forms of any size, because they are not part of the model
    shortening: int = 1  # divides the number of steps

    def size(self, rows: Rows) -> int:
        features, width = rows.inputs.shape[1], self.width
        return 2 * features + width * (features + 3 + BLOCKS * (width + 3) + rows.num_classes) + rows.num_classes

    def fit(self, rows: Rows) -> nn.Module:
        """Train with AdamW and one cycle; the number of steps follows from the size, not from a clock."""
        (total, features), width, device = rows.inputs.shape, self.width, rows.inputs.device
        generator = torch.Generator().manual_seed(SEED)
        with torch.random.fork_rng(devices=[]):  # layers draw from the global generator, which is restored
            torch.default_generator.manual_seed(SEED)
            blocks = [Residual(nn.LayerNorm(width), nn.GELU(), nn.Linear(width, width)) for _ in range(BLOCKS)]
            scaled = Scaled(shift=rows.shift, scale=rows.scales[self.units])
            model = nn.Sequential(scaled, nn.Linear(features, width), *blocks, nn.LayerNorm(width), nn.GELU(),
                                  nn.Linear(width, rows.num_classes)).to(device)
        steps = min(MOST_STEPS, 50 + 100 * total // BATCH, int(TRAINING_MACS / (3 * BATCH * self.size(rows))))
        steps = max(2, steps // self.shortening)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1)
        labels = F.one_hot(rows.labels, rows.num_classes).float()
        teachers = [teacher.fit(rows) for teacher in self.teachers]
        deviations = torch.where(rows.scales["each"] > 0, NOISE / rows.scales["each"], 0.0)
        for _ in range(steps):
            one, other = torch.randint(total, (2, BATCH), generator=generator).to(device)
            share = 0.5 * torch.rand(BATCH, 1, generator=generator).to(device)
            noise = deviations * torch.randn(BATCH, features, generator=generator).to(device)
            inputs = torch.lerp(rows.inputs[one], rows.inputs[other], share) + noise
            target = torch.lerp(labels[one], labels[other], share)
            if teachers:
                with torch.no_grad():
                    soft = torch.stack([teacher(inputs).softmax(1) for teacher in teachers]).mean(0)
                target = torch.lerp(target, soft, LISTEN)
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), target).backward()
            optimizer.step()
            schedule.step()
        return model


Candidate = Centres | Radial | Network


def closed_forms(rows: Rows, limit: int) -> list[Candidate]:
    """Return the closed forms, the simplest first; those above the limit can only teach, and have low-rank versions."""
    (total, features), classes, most = rows.inputs.shape, rows.num_classes, int(rows.counts.max())
    largest = {(limit - features) // (classes * (features + 1)),  # K that fit the limit: Centres, Radial
               (limit - 2 * features - classes) // (classes * (features + classes))}
    numbers = [number for number in sorted({2, 4, 8, 16, 32, 64, most} | largest)
               if 1 < number <= most and classes * most * features < PADDED]
    shrinkages = (1.0, 0.5, 0.2, 0.05) if features**2 * (features + classes) < FIT_MACS else (1.0, 0.3)
    settings = list(itertools.product((1,), ("one", "each"), shrinkages, (False, True)))
    affordable = [number for number in numbers if (total + features) * features * classes * number < FIT_MACS]
    settings += itertools.product(affordable, ("one", "each"), (1.0, 0.3), (False,))
    found: list[Candidate] = []
    for number, units, shrinkage, equal in settings:
        rank = (limit - features - classes * number) // (features + classes * number)
        found.append(full := Centres(number=number, units=units, shrinkage=shrinkage, equal=equal))
        found += [replace(full, rank=rank)] if full.size(rows) > limit and rank > 0 else []
    for number, units in itertools.product(numbers, ("one", "each")):
        bases = min(total, classes * number)
        if number >= 4 and total * bases * (bases + features) < FIT_MACS:
            found += [Radial(number=number, units=units, narrowness=n, ridge=r) for n in (2.0, 8.0) for r in (1e-4, 1e-2)]
    return found


@dataclass(eq=False, kw_only=True)
class Entry:
    """A candidate in the race, and the held-out rows that it classified correctly, fold by fold."""
    candidate: Candidate
    parameters: int
    right: list[Tensor] = field(default_factory=list)
    errors: int = 0

    def run(self, train: Rows, held: Rows) -> None:
        """Run one more fold."""
        model = self.candidate.fit(train)
        with torch.no_grad():
            logits = torch.cat([model(part) for part in held.inputs.split(1024)])
        self.right.append((logits.argmax(1) == held.labels) & logits.isfinite().all(1))
        self.errors += int((~self.right[-1]).sum())

    def behind(self, other: "Entry") -> float:
        """Return the errors beyond the other entry, in standard errors of the paired difference. Source: McNemar 1947."""
        pairs = list(zip(self.right, other.right))  # noqa: B905 - only the folds that both have run
        differ = sum(int((own != its).sum()) for own, its in pairs)
        return sum(int(its.sum()) - int(own.sum()) for own, its in pairs) / math.sqrt(max(1, differ))


def survivors(entries: list[Entry]) -> list[Entry]:
    """Return the better half, but at least FEWEST, of the entries not clearly behind the best, in their order."""
    ranked = sorted(entries, key=lambda entry: entry.errors)
    kept = [entry for entry in ranked if entry.behind(ranked[0]) <= CLEARLY][: max(FEWEST, len(entries) // 2)]
    return [entry for entry in entries if entry in kept]


def stratified(rows: Rows) -> list[tuple[Rows, Rows]]:
    """Return (train, held-out) for each fold; no folds if there is one row."""
    total, number = len(rows.labels), min(FOLDS if rows.inputs.shape[1] ** 3 < FIT_MACS else 3, len(rows.labels))
    order = torch.randperm(total, generator=torch.Generator().manual_seed(SEED)).to(rows.labels.device)
    fold = order[rows.labels[order].argsort(stable=True)].argsort() % number  # deal out the classes one by one
    parts = [(Rows(rows.inputs[own], rows.labels[own], rows.num_classes) for own in (fold != k, fold == k))
             for k in range(number) if number > 1]
    return [(train, held) for train, held in parts]


def train_networks(rows: Rows, limit: int, folds: list[tuple[Rows, Rows]], leader: Entry, rest: list[Entry]) -> list[Entry]:
    """Return the networks that ran all folds: not hopeless in a short heat, and never behind the leader."""
    best = {type(entry.candidate): entry.candidate for entry in sorted(rest, key=lambda entry: -entry.errors)
            if entry.behind(leader) <= CLEARLY and not isinstance(entry.candidate, Network)}
    units, taught, most = leader.candidate.units, tuple(best.values()), min(limit, NETWORK_SIZE)
    width = max((n for n in range(0, 1025, 8) if Network(width=n, units=units).size(rows) <= most), default=0)
    finished: list[Entry] = []
    for size, teachers in ((width // 2, taught), (width, taught), (width, ()))[: width]:
        network = Network(width=size, units=units, teachers=teachers)
        entry = Entry(candidate=network, parameters=network.size(rows))
        heat = replace(entry, candidate=replace(network, shortening=HEAT), right=[])
        heat.run(*folds[0])
        if heat.errors > HOPELESS * (1 + int((~leader.right[0]).sum())):
            break
        for train, held in folds:
            if entry.behind(leader) <= 0:
                entry.run(train, held)
        finished += [entry] if len(entry.right) == len(folds) else []
    return finished


class Solution:
    """The class that the evaluator loads; `report` lists the candidates that ran all folds, the winner first."""

    winner: Candidate
    report: list[tuple[str, int, float]]  # name, parameters, accuracy in cross-validation

    def solve(self, train_loader: Iterable[Any], val_loader: Iterable[Any], metadata: Any) -> nn.Module:
        """Choose a candidate by cross-validation on the rows of both loaders, and fit the choice to all rows.

        Batches are ((B, D) float, (B,) int). The metadata has num_classes, input_dim, param_limit and, if wanted, device.

        Raises:
            ValueError: no rows, rows that contradict the metadata, or a limit too low for a model of rank 1.
        """
        known = metadata if isinstance(metadata, Mapping) else {key: getattr(metadata, key) for key in dir(metadata)}
        limit, classes, input_dim = (int(known[key]) for key in ("param_limit", "num_classes", "input_dim"))
        batches = [(inputs.flatten(1), labels) for loader in (train_loader, val_loader) for inputs, labels in loader]
        if not batches or any(inputs.shape[1] != input_dim or not inputs.isfinite().all() for inputs, _ in batches):
            raise ValueError(f"expected rows of {input_dim} finite features; got none, another number, NaN or Inf")
        inputs, labels = (torch.cat(parts).to(known.get("device", "cpu")) for parts in zip(*batches, strict=True))
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"expected labels 0 to {classes - 1}; got {int(labels.min())} to {int(labels.max())}")
        rows = Rows(inputs.float(), labels.long(), classes)
        entries = [Entry(candidate=candidate, parameters=candidate.size(rows)) for candidate in closed_forms(rows, limit)]
        within = [entry for entry in entries if entry.parameters <= limit]
        above = [entry for entry in entries if entry.parameters > limit]  # race as candidates for teachers
        if not within:
            raise ValueError(f"param_limit {limit}: {input_dim} features and {classes} classes need "
                             f"{input_dim + classes + min(input_dim * classes, input_dim + classes)} or more (rank 1)")
        folds = stratified(rows)
        for train, held in folds:
            for entry in (*within, *above):
                entry.run(train, held)
            within, above = survivors(within), survivors(above)
        best = min(within, key=lambda entry: entry.errors)
        leader = next(entry for entry in within if entry.behind(best) <= CLEARLY)  # the simplest that may be as good
        if leader.errors:
            trained = train_networks(rows, limit, folds, leader, [*within, *above])
            better = [entry for entry in trained if leader.behind(entry) > CLEARLY]
            within, leader = [*within, *trained], min([leader, *better], key=lambda entry: entry.errors)
        within.sort(key=lambda entry: (entry is not leader, entry.errors))
        self.report = [(str(entry.candidate), entry.parameters, 1 - entry.errors / len(rows.labels)) for entry in within]
        self.winner = leader.candidate
        return self.winner.fit(rows)

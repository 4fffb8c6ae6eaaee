"""The heads equal scikit-learn and torchmetrics on the same features; attention finds what the mean hides."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
import torchmetrics
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from hive_ds.errors import HiveError
from hive_ds.evaluation.probes.attentive import AttentiveHead, predict_attentive
from hive_ds.evaluation.probes.cache import Features
from hive_ds.evaluation.probes.data import Split, hold_out
from hive_ds.evaluation.probes.knn import predict_knn
from hive_ds.evaluation.probes.linear import GRID, HELD_OUT, fit_logistic, predict_linear
from hive_ds.evaluation.probes.results import Score
from hive_ds.evaluation.probes.settings import AttentiveSettings, KnnSettings, LinearSettings

CLASSES = 5


def clusters(size: int, seed: int, width: int = 24, spread: float = 2.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping Gaussian classes on axes of very unequal scale, as features of unnormalised blocks are."""
    drawn = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, CLASSES, (size,), generator=drawn)
    features = centres[labels] + spread * torch.randn(size, width, generator=drawn)
    return features * torch.logspace(-2, 3, width) + 7, labels


TRAIN, TEST = clusters(600, 0), clusters(400, 1)


def sklearn_fit(features: np.ndarray, labels: np.ndarray, l2: float) -> LogisticRegression:
    return LogisticRegression(C=1 / (l2 * len(features)), tol=1e-9, max_iter=10_000).fit(features, labels)


@pytest.mark.parametrize("l2", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logistic_regression_equals_sklearn(l2: float, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr("hive_ds.evaluation.probes.linear.ROWS", 250)  # several parts, the last one smaller
    scaler = StandardScaler().fit(TRAIN[0].double().numpy())
    train, test = (scaler.transform(part[0].double().numpy()) for part in (TRAIN, TEST))
    expected = sklearn_fit(train, TRAIN[1].numpy(), l2)
    fit = fit_logistic(torch.from_numpy(train).to(dtype), TRAIN[1], CLASSES, l2, max_steps=500)
    np.testing.assert_allclose(fit.weight.numpy(), expected.coef_, atol=2e-3)
    np.testing.assert_allclose(fit.bias.numpy(), expected.intercept_, atol=2e-3)
    logits = fit.logits(torch.from_numpy(test))
    np.testing.assert_allclose(logits.softmax(-1).numpy(), expected.predict_proba(test), atol=1e-3)
    np.testing.assert_array_equal(logits.argmax(-1).numpy(), expected.predict(test))
    warm = fit_logistic(torch.from_numpy(train).to(dtype), TRAIN[1], CLASSES, l2, max_steps=500, start=fit)
    assert warm.steps <= 1


def test_linear_head_equals_sklearn_on_standardised_features() -> None:
    scaler = StandardScaler().fit(TRAIN[0].double().numpy())
    train, test = (scaler.transform(part[0].double().numpy()) for part in (TRAIN, TEST))
    predicted, fit = predict_linear(*TRAIN, TEST[0], CLASSES, LinearSettings(l2=3e-3), seed=0)
    expected = sklearn_fit(train, TRAIN[1].numpy(), 3e-3)
    np.testing.assert_array_equal(predicted.numpy(), expected.predict(test))
    assert (predicted == TEST[1]).float().mean() == expected.score(test, TEST[1].numpy()) > 0.5
    assert fit["l2"] == 3e-3
    assert fit["gradient"] < 1e-4
    constant = torch.cat([TRAIN[0], torch.full((600, 1), 5.0)], -1), torch.cat([TEST[0], torch.full((400, 1), 5.0)], -1)
    again, _ = predict_linear(constant[0], TRAIN[1], constant[1], CLASSES, LinearSettings(l2=3e-3), seed=0)
    assert torch.equal(again, predicted)


@pytest.mark.parametrize("seed", [0, 1])
def test_l2_is_the_best_on_held_out_training_images(seed: int) -> None:
    features = StandardScaler().fit_transform(TRAIN[0].double().numpy())[:150]
    labels = TRAIN[1].numpy()[:150]
    kept, held = hold_out(labels, HELD_OUT, seed)
    rights = [
        int((sklearn_fit(features[kept], labels[kept], l2).predict(features[held]) == labels[held]).sum())
        for l2 in GRID
    ]
    assert len(set(rights)) > 1  # there is something to choose
    train = torch.from_numpy(features).float()
    _, fit = predict_linear(train, TRAIN[1][:150], train, CLASSES, LinearSettings(), seed)
    assert fit["l2"] == GRID[rights.index(max(rights))]


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (200, 0.5), (600, 0.001)])
def test_knn_equals_sklearn(k: int, temperature: float, monkeypatch) -> None:
    monkeypatch.setattr("hive_ds.evaluation.probes.knn.ROWS", 130)
    # The largest weight is 1 here too: at 0.001 the plain ones overflow.
    expected = KNeighborsClassifier(
        k, metric="cosine", weights=lambda far: np.exp((far.min(1, keepdims=True) - far) / temperature)
    ).fit(TRAIN[0].double().numpy(), TRAIN[1].numpy())
    train, test = TRAIN[0].double(), TEST[0].double()
    predicted, _ = predict_knn(train, TRAIN[1], test, CLASSES, KnnSettings(k, temperature))
    np.testing.assert_array_equal(predicted.numpy(), expected.predict(test.numpy()))
    assert len(set(predicted.tolist())) > 3


def test_knn_wants_enough_images() -> None:
    with pytest.raises(HiveError, match="k is 21, expected at most the 20"):
        predict_knn(TRAIN[0][:20], TRAIN[1][:20], TEST[0], CLASSES, KnnSettings(21))


def test_accuracies_equal_torchmetrics() -> None:
    predicted, _ = predict_linear(*TRAIN, TEST[0], CLASSES, LinearSettings(l2=1.0), seed=0)
    chosen = torch.cat([torch.arange(400)[TEST[1] == 0], torch.arange(150)])  # unequal classes
    score = Score.of(0, predicted[chosen].numpy(), TEST[1][chosen].numpy(), {})
    for average, ours in (("micro", score.share.value), ("macro", score.mean_per_class)):
        metric = torchmetrics.Accuracy(task="multiclass", num_classes=CLASSES, average=average)
        assert ours == pytest.approx(float(metric(predicted[chosen], TEST[1][chosen])), abs=1e-6)
    assert score.share.value != pytest.approx(score.mean_per_class, abs=1e-3)


WIDTH, PATCHES = 16, 9


def one_patch_decides(size: int, seed: int) -> tuple[Features, np.ndarray]:
    """A marked patch holds the class; the others cancel it, so that the mean over patches holds none of it."""
    drawn = np.random.default_rng(seed)
    labels = drawn.integers(0, 2, size)
    tokens = drawn.normal(0, 0.3, (size, PATCHES, WIDTH)).astype(np.float32)
    place = drawn.integers(0, PATCHES, size)
    sign = 4.0 * (2 * labels - 1)
    tokens[:, :, 1] = -sign[:, None] / (PATCHES - 1)
    tokens[np.arange(size), place, 0] = 6.0
    tokens[np.arange(size), place, 1] = sign
    return Features(tokens, np.full(size, PATCHES)), labels


def attentive(train: tuple, test: tuple, seed: int, **changes) -> tuple[np.ndarray, float]:
    split = Split(np.arange(len(train[1])), train[1], np.arange(len(test[1])), test[1])
    settings = AttentiveSettings(**{"epochs": 15, "batch_size": 50, "lr": 3e-3, **changes})
    predicted, fit = predict_attentive(
        train[0], test[0], split, 2, settings, num_heads=4, seed=seed, device=torch.device("cpu")
    )
    return predicted.numpy(), fit["loss"]


def test_attention_finds_what_the_mean_hides() -> None:
    train, test = one_patch_decides(600, 0), one_patch_decides(300, 1)
    means = [torch.from_numpy(part[0].values).mean(1) for part in (train, test)]
    linear, _ = predict_linear(means[0], torch.from_numpy(train[1]), means[1], 2, LinearSettings(), seed=0)
    assert (linear.numpy() == test[1]).mean() < 0.6
    state = torch.get_rng_state()
    predicted, loss = attentive(train, test, seed=0)
    assert (predicted == test[1]).mean() > 0.95
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    again, same_loss = attentive(train, test, seed=0)
    assert np.array_equal(predicted, again)
    assert loss == same_loss
    assert attentive(train, test, seed=1)[1] != loss


def test_attentive_head_is_trained_as_the_page_says() -> None:
    """A plain loop: AdamW along a cosine to 0, clipped, norms and biases not decayed; the mean of the last epoch."""
    features, labels = one_patch_decides(91, 0)
    changes = {"epochs": 3, "batch_size": 40, "lr": 0.05, "weight_decay": 0.5, "clip": 0.1}
    _, found = attentive((features, labels), (features, labels), 5, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        head = AttentiveHead(WIDTH, 4, 2)
    weights = list(head.parameters())
    optimizer = torch.optim.AdamW([{"params": [one], "weight_decay": 0.5 * (one.dim() > 1)} for one in weights])
    drawn, step = np.random.default_rng(5), 0
    for _ in range(3):
        losses: list[float] = []
        for rows in np.array_split(drawn.permutation(91), 3):
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * (1 + math.cos(math.pi * step / 9)) / 2
            loss = torch.nn.functional.cross_entropy(
                head(torch.from_numpy(features.values[rows])), torch.from_numpy(labels[rows])
            )
            optimizer.zero_grad()
            loss.backward()
            norm = math.sqrt(sum(float(one.grad.square().sum()) for one in weights))
            for one in weights:
                one.grad *= min(1.0, 0.1 / norm)
            optimizer.step()
            step += 1
            losses += [loss.item()] * len(rows)
    assert found == pytest.approx(statistics.fmean(losses), rel=1e-4)


def test_attentive_head_does_not_see_padding() -> None:
    head = AttentiveHead(WIDTH, 4, 7)
    tokens = torch.randn(3, PATCHES, WIDTH)
    padding = torch.arange(PATCHES) >= torch.tensor([PATCHES, 4, 1])[:, None]
    logits = head(tokens, padding)
    assert logits.shape == (3, 7)
    torch.testing.assert_close(head(tokens[1:2, :4])[0], logits[1])
    junk = torch.where(padding[..., None], 1e4, tokens)
    torch.testing.assert_close(head(junk, padding), logits)
    # Counts of features become that mask: the same junk, in a file's place, changes nothing.
    counts = np.tile([PATCHES, 4, 1], 20)
    values = np.tile(tokens.numpy(), (20, 1, 1))
    filled = np.where(np.tile(padding.numpy(), (20, 1))[..., None], 50.0, values).astype(np.float16)
    labels = np.arange(60) % 2
    runs = [
        attentive((Features(one.astype(np.float16), counts), labels), (Features(one, counts), labels), 0, epochs=1)[1]
        for one in (values, filled)
    ]
    assert runs[0] == runs[1]

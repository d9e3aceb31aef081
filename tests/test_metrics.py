"""The confusion matrix against a plain loop, the metrics against their definitions, the table as it is printed."""

import numpy as np
import pytest

from nanocnn.metrics import Metrics, confusion_matrix, confusion_table, print_confusion

CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def sample(n=2000, classes=10, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    return labels, np.where(rng.random(n) < 0.8, labels, rng.integers(0, classes, n))


def test_confusion_counts_pairs_of_true_and_predicted():
    labels, predictions = sample()
    expected = np.zeros((10, 10), int)
    for true, predicted in zip(labels, predictions, strict=True):
        expected[true, predicted] += 1
    matrix = confusion_matrix(labels, predictions, 10)
    assert matrix.dtype == np.int64
    np.testing.assert_array_equal(matrix, expected)


def test_the_matrices_of_shards_add_up():
    labels, predictions = sample()
    shards = sum(confusion_matrix(labels[rank::3], predictions[rank::3], 10) for rank in range(3))
    np.testing.assert_array_equal(shards, confusion_matrix(labels, predictions, 10))


def test_no_samples():
    matrix = confusion_matrix(np.empty(0, np.int64), np.empty(0, np.int64), 3)
    np.testing.assert_array_equal(matrix, np.zeros((3, 3)))
    metrics = Metrics.of(matrix)
    assert (metrics.accuracy, metrics.precision, metrics.recall, metrics.f1) == (0, 0, 0, 0)


def test_small_integers_do_not_overflow():
    labels = np.full(3, 200, np.uint8)
    assert confusion_matrix(labels, labels, 201)[200, 200] == 3


@pytest.mark.parametrize(
    ("labels", "predictions", "error", "words"),
    [
        ([0, 3, 1], [0, 1, 1], ValueError, "label 3 at index 1 is out of range: expected 0 to 2"),
        ([0, 2, 1], [0, -1, 1], ValueError, "prediction -1 at index 1"),
        ([0, 1], [0, 1, 1], ValueError, "do not match"),
        ([[0, 1]], [[0, 1]], ValueError, "do not match"),
        ([0.0, 1.0], [0, 1], TypeError, "labels are float64: expected integers"),
    ],
)
def test_bad_input(labels, predictions, error, words):
    with pytest.raises(error, match=words):
        confusion_matrix(np.array(labels), np.array(predictions), 3)


def test_metrics_by_their_definitions():
    labels, predictions = sample(500, 4, seed=1)
    metrics = Metrics.of(confusion_matrix(labels, predictions, 4))
    precisions, recalls, f1s = [], [], []
    for c in range(4):
        hits = np.sum((labels == c) & (predictions == c))
        precisions.append(hits / np.sum(predictions == c))
        recalls.append(hits / np.sum(labels == c))
        f1s.append(2 * precisions[c] * recalls[c] / (precisions[c] + recalls[c]))
    assert metrics.accuracy == pytest.approx(np.mean(labels == predictions))
    np.testing.assert_allclose(metrics.class_precision, precisions)
    np.testing.assert_allclose(metrics.class_recall, recalls)
    np.testing.assert_allclose(metrics.class_f1, f1s)
    assert metrics.f1 == pytest.approx(np.mean(f1s))  # not the F1 of the mean precision and recall


def test_a_class_without_samples_or_predictions_counts_zero():
    # Class 1 is never predicted, class 2 has no samples, class 3 has neither.
    metrics = Metrics.of(np.array([[4, 0, 1, 0], [2, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))
    np.testing.assert_allclose(metrics.class_precision, [4 / 6, 0, 0, 0])
    np.testing.assert_allclose(metrics.class_recall, [4 / 5, 0, 0, 0])
    np.testing.assert_allclose(metrics.class_f1, [8 / 11, 0, 0, 0])
    assert metrics.precision == pytest.approx(4 / 6 / 4)
    assert "accuracy 57.14%" in str(metrics)


def test_table_fits_100_columns_for_ten_classes(capsys):
    labels, predictions = sample(50_000)
    print_confusion(confusion_matrix(labels, predictions, 10), CIFAR)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert all(name in printed for name in CIFAR)
    assert "\x1b" not in printed


def test_table_of_many_classes_shows_the_worst(capsys):
    matrix = np.diag(np.full(50, 10))
    matrix[7] = np.roll(matrix[7], 1)  # class 7 is always taken for class 8
    print_confusion(matrix, [f"kind {i}" for i in range(50)])
    printed = capsys.readouterr().out
    assert "the 10 classes of 50 with the lowest recall" in printed
    assert "kind 7" in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_table_needs_a_name_for_each_class():
    with pytest.raises(ValueError, match="9 class names for a confusion matrix of 10 classes"):
        confusion_table(np.eye(10, dtype=int), CIFAR[:9])

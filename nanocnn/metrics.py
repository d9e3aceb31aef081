"""How good a classifier is: the confusion matrix and the four numbers that people ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def confusion_matrix(labels: Any, predictions: Any, classes: int) -> np.ndarray:
    """(N,) labels, (N,) predictions -> (C, C) int64 counts: rows are the true classes, columns the predicted ones.

    The matrices of shards add up to the matrix of the whole. Raises TypeError for numbers that are not integers and
    ValueError for shapes that differ or a class outside 0 ... C - 1.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.ndim != 1 or labels.shape != predictions.shape:
        raise ValueError(
            f"labels {labels.shape} and predictions {predictions.shape} do not match: expected two arrays of one "
            "shape (N,); take argmax(axis=-1) of logits first"
        )
    for what, numbers in ("label", labels), ("prediction", predictions):
        if numbers.size and numbers.dtype.kind not in "iu":
            raise TypeError(f"{what}s are {numbers.dtype}: expected integers")
        outside = np.flatnonzero((numbers < 0) | (numbers >= classes))
        if outside.size:
            raise ValueError(
                f"{what} {numbers[outside[0]]} at index {outside[0]} is out of range: expected 0 to {classes - 1} "
                f"({outside.size} of {numbers.size} are outside; is the number of classes right?)"
            )
    cells = labels.astype(np.int64) * classes + predictions.astype(np.int64)
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Metrics:
    """Accuracy, and precision, recall and F1 as plain means over the classes (macro), with each class's own values.

    A class that was never predicted has precision 0, a class without samples recall 0, and both count in the means:
    scikit-learn's `average="macro", zero_division=0, labels=range(C)`.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    class_precision: np.ndarray  # (C,)
    class_recall: np.ndarray  # (C,)
    class_f1: np.ndarray  # (C,)
    confusion: np.ndarray  # (C, C)

    @classmethod
    def of(cls, confusion: np.ndarray) -> Metrics:
        """The metrics of a (C, C) confusion matrix, rows true and columns predicted."""
        right, true, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
        precision, recall, f1 = _ratio(right, predicted), _ratio(right, true), _ratio(2 * right, true + predicted)
        return cls(
            accuracy=float(_ratio(right.sum(), confusion.sum())),
            precision=float(precision.mean()),
            recall=float(recall.mean()),
            f1=float(f1.mean()),
            class_precision=precision,
            class_recall=recall,
            class_f1=f1,
            confusion=confusion,
        )

    def __str__(self) -> str:
        return (
            f"accuracy {self.accuracy:.2%}  precision {self.precision:.2%}  recall {self.recall:.2%}  "
            f"F1 {self.f1:.2%}  (precision, recall and F1: means over the classes)"
        )


def _ratio(part: Any, whole: Any) -> np.ndarray:
    """part / whole, and 0 where the whole is 0."""
    return np.where(whole > 0, part / np.maximum(whole, 1), 0.0)


def confusion_table(confusion: np.ndarray, names: Sequence[str], most: int = 10) -> Table:
    """The confusion matrix as a rich table, about 80 columns wide at ten classes, coloured by the share of the row.

    Of more than `most` classes it shows those with the lowest recall, since nobody reads a table of 100 x 100.
    """
    if len(names) != len(confusion):
        raise ValueError(f"{len(names)} class names for a confusion matrix of {len(confusion)} classes")
    recall = Metrics.of(confusion).class_recall
    shown = np.sort(np.argsort(recall, kind="stable")[:most])
    title = "rows: true class, columns: predicted class"
    if len(names) > most:
        title += f"; the {most} classes of {len(names)} with the lowest recall"
    table = Table(title=title, title_justify="left", title_style="dim", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for j in shown:
        table.add_column(names[j][:5], justify="right", no_wrap=True)
    table.add_column("recall", justify="right", no_wrap=True)
    for i in shown:
        share = _ratio(confusion[i], confusion[i].sum())
        cells = [Text(str(confusion[i, j]) if confusion[i, j] else ".", _style(i == j, share[j])) for j in shown]
        table.add_row(names[i][:10], *cells, f"{recall[i]:.1%}")
    return table


def _style(right: bool, share: float) -> str:
    if right:
        return "bold green"
    return "red" if share >= 0.1 else "yellow" if share >= 0.03 else "dim"


def print_confusion(confusion: np.ndarray, names: Sequence[str]) -> None:
    """Print the table: as wide as the terminal, or 100 columns without colours where the output goes elsewhere."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=100, color_system=None)
    console.print(confusion_table(confusion, names))

"""Accuracy, balanced accuracy and ROC-AUC of class probabilities, for slides, cases or tiles, as an `evaluate` module."""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score


_DESCRIPTION = """
How well class probabilities fit the true classes: accuracy, balanced accuracy (the mean recall of the classes) and the
area under the ROC curve, one class against the rest and averaged over the classes with equal weight.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: for each item the probabilities of the C classes, C >= 2.
    references: for each item the index of its class.
Returns:
    accuracy, balanced_accuracy, roc_auc, all in [0, 1]. With two classes roc_auc is that of the second.
Raises:
    ValueError when a class has no item, because its ROC curve does not exist.
"""

_CITATION = """
@article{scikit-learn, title={Scikit-learn: Machine Learning in {P}ython}, author={Pedregosa, F. and others},
journal={Journal of Machine Learning Research}, volume={12}, pages={2825--2830}, year={2011}}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Classification(evaluate.Metric):
    """Computed by scikit-learn; the class with the highest probability is the predicted one."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        probabilities = np.asarray(predictions)  # (n, C)
        references = np.asarray(references)  # (n,)
        classes = range(probabilities.shape[1])
        absent = sorted(set(classes) - set(references.tolist()))
        if absent:
            raise ValueError(f"class {absent[0]} has no item: its ROC curve does not exist")
        predicted = probabilities.argmax(axis=1)
        one_against_rest = [roc_auc_score(references == c, probabilities[:, c]) for c in classes]
        return {
            "accuracy": float(accuracy_score(references, predicted)),
            "balanced_accuracy": float(recall_score(references, predicted, average="macro", zero_division=0.0)),
            "roc_auc": float(one_against_rest[1] if len(classes) == 2 else np.mean(one_against_rest)),
        }

"""Real data that ships with the package."""

from dataclasses import dataclass
from importlib import resources

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Dataset:
    """`X` [rows, features] and `y` [rows], with their names and units ("" for none); float64, as measured."""

    X: npt.NDArray[np.float64]
    y: npt.NDArray[np.float64]
    feature_names: list[str]
    target_name: str
    feature_units: list[str]
    target_unit: str


def load_diabetes() -> Dataset:
    """The diabetes study: 442 patients, 10 measurements at the start, and the progression of the disease one year later.

    Age (years), sex (1 or 2), body mass index (kg/m^2), average blood pressure (mm Hg), and six blood serum measurements: total
    cholesterol, low- and high-density lipoproteins (mg/dl), total cholesterol / HDL, log of triglycerides, glucose (mg/dl). Source:
    Efron, Hastie, Johnstone and Tibshirani (2004), Least Angle Regression, Annals of Statistics 32, 407-499.
    """
    text = resources.files(__name__).joinpath("diabetes.csv").read_text(encoding="utf-8")
    header, *lines = text.splitlines()
    table = np.array([[float(value) for value in line.split(",")] for line in lines])
    names = header.split(",")
    units = ["years", "", "kg/m²", "mmHg", "mg/dl", "mg/dl", "mg/dl", "", "log mg/dl", "mg/dl"]
    return Dataset(table[:, :-1].copy(), table[:, -1].copy(), names[:-1], names[-1], units, "score")

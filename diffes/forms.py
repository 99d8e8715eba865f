"""Forms of the JSON files in a folder.

A file may come from a stranger, and its checksum only shows that it is complete, not that it is honest. So types and
ranges are checked before use.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, RootModel, StringConstraints, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, to_json

from diffes.errors import DiffesError

AGAIN = "restore it or run `diffes search` again with --overwrite"

Count = Annotated[int, Field(ge=0, le=2**53)]
Number = Annotated[int, Field(ge=1, le=2**53)]
Amount = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=4096)]  # safe to print
Prompt = Annotated[str, StringConstraints(pattern=r"\S")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Range = Annotated[list[Count], Field(min_length=2, max_length=2)]
Coefficients = Annotated[list[Annotated[list[float], Field(min_length=2, max_length=1001)]], Field(min_length=1)]
CostTable = Annotated[list[Annotated[list[Amount], Field(min_length=1)]], Field(min_length=1)]


TOLD = {  # plain messages in place of some of pydantic's
    "model_type": "it should be a JSON object",
    "string_pattern_mismatch": "it should be a text of another form, not empty",
}


class Form(BaseModel):
    """JSON object with strict types: numbers are finite, and no truth value or text is a whole number.

    Unknown keys are allowed.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow", protected_namespaces=())

    def to_json(self) -> dict[str, Any]:
        """Return plain values: all fields that were given, and no others."""
        return self.model_dump(exclude_unset=True)


F = TypeVar("F", bound=BaseModel)


def checked(form: type[F], data: Any, path: object, hint: str = AGAIN, wrong: str = "is damaged") -> F:
    """Return the form that data fill.

    Args:
        form: the expected form.
        data: the data that were read.
        path: their file, for the message.
        hint: what the message says to do about an error.
        wrong: what the message says about the file.

    Raises:
        DiffesError: the data do not match; the message names the first wrong place and what is expected there.
    """
    try:
        return form.model_validate(data)
    except ValidationError as error:
        raise DiffesError(f"{path} {wrong} ({_said(error)}); {hint}") from None


def parsed(form: TypeAdapter[Any], data: Any, place: object, hint: str = AGAIN, wrong: str = "is damaged") -> Any:
    """Return the object that JSON data describe; see `checked`. Types are strict.

    Raises:
        DiffesError: the data do not match; the message names the first wrong place and what is expected there.
    """
    try:
        return form.validate_json(to_json(data), strict=True)
    except (ValidationError, PydanticSerializationError) as error:
        said = _said(error) if isinstance(error, ValidationError) else str(error)
        raise DiffesError(f"{place} {wrong} ({said}); {hint}") from None


def _said(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(_places(first["loc"]))
    if first["type"] == "missing":
        return f"it lacks {place}"
    wanted = TOLD.get(first["type"], first["msg"].replace("Input should", "it should"))
    return f"{place + ': ' if place else ''}{wanted}, got {reprlib.repr(first['input'])}"


def _places(loc: tuple[int | str, ...]) -> Iterator[str]:
    return (reprlib.repr(part)[1:-1] if isinstance(part, str) else str(part) for part in loc)


class LayerSplit(Form):
    """Split of the levels over the layers (see `diffes.pruning.bank.split_of`)."""

    sets: list[Text]
    groups: list[Count]
    kept: dict[Text, list[Count]]


class Pruned(Form):
    """Facts about a bank: its method, model, stages and levels."""

    method: Text
    allocation: Literal["sensitivity", "damage", "equal"] = "equal"
    kind: Text
    model: Text
    stages: Annotated[list[Range], Field(min_length=1)]
    max_level: Number
    split: LayerSplit | None = None


class StageEntry(Form):
    """Entry of a stage at a level: for each set, the place of its tensors, and the number of groups that stay."""

    stage: Count
    level: Number
    sets: dict[Text, Annotated[tuple[Text, Count], Field(strict=False)]]  # JSON has lists


class StageFile(Form):
    """Calibrated stage, `calibration/stageN.json`."""

    kind: Text
    max_level: Number
    calls: Count
    entries: list[StageEntry]
    sha256: Digest
    checksum: Digest


class Artifact(Pruned):
    """Fields that `schedule.json` and `front.json` share. The last three are those of the file."""

    guidance: Amount
    guidance_range: Annotated[list[Amount], Field(min_length=2, max_length=2)] | None = None
    dtype: Literal["float32", "float16", "bfloat16"]
    format_version: Number | None = None
    bank_sha256: Digest | None = None
    checksum: Digest | None = None


class ScheduleFacts(Artifact):
    """Content of `schedule.json`."""

    levels: list[Count]
    steps: Number
    nominal_sparsity: Fraction
    macs_fraction: Amount


class End(Form):
    """Held-out error of a plan at an end of a range of guidance."""

    guidance: Amount
    latent_mse: Amount | None
    latent_interval: Annotated[list[Amount], Field(min_length=2, max_length=2)] | None = None


class MeasuredPlan(Form):
    """Plan with its measurements, which are None where they failed.

    For its calls, in the order of sampling, `timesteps` are training timesteps, `sigmas` noise over signal there, as
    diffusers' schedulers count it, without the final 0. `levels` are 0 for dense calls, and `coefficients` are of the
    latents, then of the clean predictions, newest first. `cost` and `budget` are in dense calls of the front's
    currency. `fit_mean` is the fitness on the probes of the final fit, by which plans are
    ranked; all else is measured on held-out probes. `ends` holds the errors at both ends of a range of guidance.
    """

    kind: Text
    budget: Positive
    cost: Positive
    n_calls: Number
    heldout_mean: float | None
    heldout_std: float | None
    latent_mse: Amount | None
    timesteps: Annotated[list[Count], Field(min_length=1)]
    sigmas: list[Amount]
    levels: Annotated[list[Count], Field(min_length=1)]
    calls_spent: Count
    solver: Text | None = None  # this and the following fields: since format 2
    coefficients: Coefficients | None = None
    fit_mean: float | None = None
    latent_median: Amount | None = None
    latent_interval: Annotated[list[Amount], Field(min_length=2, max_length=2)] | None = None
    image_mse: Amount | None = None
    image_mse_error: Amount | None = None
    ssim: float | None = None
    ssim_error: Amount | None = None
    variance: Amount | None = None
    ends: list[End] = []

    @property
    def ranked(self) -> float | None:
        """Value by which a plan of a front is chosen, higher is better: its fitness on the probes of the final fit.

        Fronts of format 1 have none, so their plans are chosen by the held-out mean. None for a plan that failed.
        """
        if self.heldout_mean is None:
            return None
        return self.fit_mean if "fit_mean" in self.model_fields_set else self.heldout_mean


class PlanPoint(MeasuredPlan):
    """Plan of a front: a measured plan with the milliseconds of a run."""

    ms: Positive


class Reference(Form):
    """Reference that plans are compared with. `alphas` are the signal at the first, middle and last timestep."""

    solver: Text
    steps: Number
    spacing: Text = "trailing"
    final_sigma: Amount = 0.0
    alphas: list[Amount] = []


class TimedOn(Form):
    """Conditions under which plans were timed."""

    batch: Number
    repeats: Number
    device: Text
    threads: Number


class FrontRecord(Artifact):
    """Content of `front.json`: facts about the calibration and the reference, and plans with their measurements."""

    reference: Reference
    strength: Fraction | None = None  # share of the trajectory, of pipelines that begin with an image
    latent_shape: list[Number] | None = None  # of one image, as the pipeline holds it; since format 2
    solver: Text
    currency: Text
    metric: Text
    nodes: Number
    points: Annotated[list[PlanPoint], Field(min_length=1)]
    prediction_type: Text | None = None  # this and the following fields: newer than the first fronts
    genes: Text | None = None
    search_probes: Number | None = None
    fit_probes: Number | None = None
    heldout: Number | None = None
    timing: TimedOn | None = None
    reference_calls: Count | None = None
    calls_spent: Count | None = None


class Fingerprint(Form):
    """Fingerprint that identifies a denoiser."""

    structure: Digest
    sample: list[float]


class BankHeader(Form):
    """Metadata of a bank. Fields that older versions lack have defaults."""

    format_version: Number
    kind: Text
    method: Text = "?"
    max_level: Count = 0
    stages: list[Range] = []
    split: LayerSplit | None = None
    same: dict[Text, Text] = {}
    fingerprint: Fingerprint | None = None


class CostsFile(Form):
    """`costs.json` of a run. Older versions wrote no checksum."""

    cost: Text
    costs: CostTable
    checksum: Digest | None = None


class CellCosts(RootModel[dict[Text, CostTable]]):
    """`costs.json` of many cells, by the digest of their settings."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class ConfigFile(Form):
    """`config.json`; the settings themselves are checked against their own types."""

    settings: dict[Text, Any]
    versions: dict[Text, Text]


class Prompts(Form):
    """File of prompts."""

    search: Annotated[list[Prompt], Field(min_length=1)]
    heldout: Annotated[list[Prompt], Field(min_length=1)]
    calibration: list[Prompt] = []


class Paid(Form):
    """Facts about an evaluation that a trial of a study holds beside levels and fitness."""

    denoiser_calls: Count
    seconds: Amount
    fidelity: Annotated[float, Field(gt=0, le=1)] = 1.0
    coefficients: Coefficients | None = None
    digest: Digest | None = None
    worker: str | None = None
    waited: Amount = 0.0
    paid_calls: Count = 0

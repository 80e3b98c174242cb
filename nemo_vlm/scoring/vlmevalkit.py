"""Scores by an unmodified checkout of VLMEvalKit, whose run.py runs in this process with a model of ours.

What run.py leaves undone is done here: it ends well where datasets failed, says what failed in its log only, wants
NCCL, and a judge that is asked over the network.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from nemo_vlm.errors import ConfigError
from nemo_vlm.files import stamp
from nemo_vlm.scoring import adapter, report, results
from nemo_vlm.scoring.exports import digest_of, huggingface, key_of
from nemo_vlm.scoring.ranks import join
from nemo_vlm.sources.opening import open_source

log = logging.getLogger(__name__)

JUDGES = ("OPENAI_API_KEY", "AZURE_OPENAI_API_KEY", "SiliconFlow_API_KEY", "LOCAL_LLM")  # variables that name a judge
WITHOUT_JUDGE = ("--judge", "exact_matching")
NAMED_BY_CONFIG = ("model", "data", "name", "cache", "precision", "max_new_tokens")
FOREIGN = (  # run.py's flags that do nothing to a model that is opened here
    *("use_vllm", "base_url", "api_mode", "key", "thinker", "max_tokens", "temperature", "top_k", "top_p"),
    *("repetition_penalty", "timeout", "custom_prompt", "stream", "extra_body", "video_llm", "local_media"),
    *("monitor_interval", "debug"),
)
ENVIRONMENT = "requirements/eval.txt says how VLMEvalKit's environment is made"


@dataclass(frozen=True)
class Evaluation:
    """What is asked for, as flags of scripts/evaluate_vlm.py.

    Attributes:
        vlmevalkit: the checkout.
        model: what open_source takes; empty where `config` names it.
        name: of the model, in the names of the results; empty: its file's.
        config: a file as print_config writes it, in place of model and data.
        others: flags of run.py.
    """

    vlmevalkit: Path
    work_dir: Path
    model: str = ""
    data: tuple[str, ...] = ()
    name: str = ""
    config: Path | None = None
    baseline: Path | None = None
    cache: Path | None = None
    precision: str = "auto"
    max_new_tokens: int = 512
    verbose: bool = False
    others: tuple[str, ...] = ()

    @property
    def called(self) -> str:
        return self.name or Path(os.path.abspath(self.model)).name.removesuffix(".nemo")

    @property
    def command(self) -> list[str]:
        """That of run.py."""
        if self.config is not None:
            asked = ["--config", str(self.config)]
        else:
            asked = ["--model", self.called, "--data", *self.data]
        verbose = ["--verbose"] * self.verbose
        return [str(self.vlmevalkit / "run.py"), *asked, "--work-dir", str(self.work_dir), *verbose, *self.others]

    def export(self) -> Path:
        """The model as a Hugging Face directory.

        Raises:
            ConfigError: it cannot be made one.
        """
        return huggingface(self.model, "--model", self.cache)


def evaluate(asked: Evaluation) -> None:
    """Score a model; ends the process with 1 where a dataset failed, each of them named.

    Raises:
        ConfigError: the checkout, its environment, the model, the baseline or a flag of run.py is not as it must be.
    """
    ranks, started = join(), time.time()
    with ranks.together():
        baseline = None if asked.baseline is None else report.read_scores(asked.baseline, "--baseline")
        name, datasets = subject(asked)
        folder = results.make_folder(asked.work_dir, name)
        run = load_run(asked.vlmevalkit)
        options = parse(run, asked)
    with ranks.together():
        key = checkpoint(asked) if ranks.rank == 0 else ""
        if ranks.rank == 0:
            results.claim(folder, key, options.reuse or options.mode == "eval")
    with ranks.together():
        if ranks.first_of_node and asked.config is None and options.mode != "eval":
            asked.export()
    with ranks.together():
        register(asked, run, options.mode)
    ranks.replace_torch()
    ranks.listen(run.logger)
    run.main()
    if ranks.rank == 0:
        conclude(this_run(folder, started), datasets, key, baseline)


def subject(asked: Evaluation) -> tuple[str, list[str]]:
    """The model's name and the datasets'.

    Raises:
        ConfigError: there is none, or several models, or it sees nothing, or is named twice.
    """
    if asked.config is None:
        if not asked.model or not asked.data:
            raise ConfigError("--model, --data: which model is to be scored, on which datasets?")
        if asked.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens={asked.max_new_tokens}: must be 1 or more")
        if "/" in asked.called:
            raise ConfigError(f"--name={asked.called}: must be a folder's name, without /")
        if not open_source(asked.model, "--model").model.reads_media:
            raise ConfigError(f"--model={asked.model}: sees no images; scripts/evaluate_lm.py scores language models")
        return asked.called, list(asked.data)
    again = [name for name in NAMED_BY_CONFIG if getattr(asked, name) != getattr(Evaluation, name)]
    if again:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in again)
        raise ConfigError(f"--config={asked.config}: names the model and the data itself; leave out {flags}")
    name, _, datasets = read_config(asked.config)
    return name, datasets


def read_config(file: Path) -> tuple[str, dict[str, Any], list[str]]:
    """The model's name, its class with arguments, and the datasets' names.

    Raises:
        ConfigError: it is none, or of several models.
    """
    try:
        config = json.loads(file.read_text())
        ((name, model),), datasets = config["model"].items(), list(config["data"])
        return name, {**model}, datasets
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        right = 'a JSON file {"model": {NAME: {...}}, "data": {NAME: {...}}} of one model'
        raise ConfigError(f"--config={file}: must be {right} ({error})") from None


def checkpoint(asked: Evaluation) -> str:
    """Tells it from others of the same name; with a config also its class and arguments.

    Raises:
        ConfigError: as key_of.
    """
    if asked.config is None:
        return key_of(asked.model, "--model", asked.cache)
    _, model, _ = read_config(asked.config)
    places = [Path(value) for name, value in model.items() if name == "model_path" and Path(value).is_dir()]
    return digest_of(repr([model, *map(stamp, places)]).encode())


def load_run(checkout: Path) -> ModuleType:
    """The checkout's run.py, which chooses this rank's GPU when it is imported, so nothing may have looked for it.

    Raises:
        ConfigError: it is not there, or packages that it needs are not.
    """
    file = checkout / "run.py"
    if not (checkout / "vlmeval").is_dir() or not file.is_file():
        raise ConfigError(
            f"--vlmevalkit={checkout}: no checkout of VLMEvalKit (run.py, vlmeval/); "
            "git clone https://github.com/open-compass/VLMEvalKit makes one"
        )
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else an import asks the network
    sys.path.insert(0, str(checkout.absolute()))
    spec = importlib.util.spec_from_file_location("vlmevalkit_run", file)
    assert spec is not None and spec.loader is not None
    run = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(run)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--vlmevalkit={checkout}: its package {error.name} is not in {sys.prefix}; {ENVIRONMENT}"
        ) from None
    run.load_env()  # the checkout's .env may hold the judge's key
    return run


def parse(run: ModuleType, asked: Evaluation) -> Any:
    """Let run.py read its flags, and choose a judge that needs no network where none was given.

    Raises:
        ConfigError: run.py refuses them.
    """
    os.environ.pop("MMEVAL_ROOT", None)  # which run.py would take instead of --work-dir
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            sys.argv = asked.command[:1]
            defaults = vars(run.parse_args())
            sys.argv = asked.command
            options = run.parse_args()
    except SystemExit:
        reason = (said.getvalue().splitlines() or ["refused"])[-1]
        raise ConfigError(f"{reason} ({asked.vlmevalkit / 'run.py'} --help tells its flags)") from None
    changed = [name for name, value in vars(options).items() if name in FOREIGN and value != defaults[name]]
    if changed:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        raise ConfigError(f"{flags}: no flag for a model that is opened here, whose length is --max-new-tokens")
    given = (options.judge, options.judge_key, options.judge_base_url, *map(os.environ.get, JUDGES))
    if not any(given) and options.mode != "infer":
        log.info("no judge is given (--judge, or a key such as %s): %s", JUDGES[0], " ".join(WITHOUT_JUDGE))
        sys.argv += WITHOUT_JUDGE
    return options


def register(asked: Evaluation, run: ModuleType, mode: str) -> None:
    """Make the model known to the checkout; opened now, so that a fault of it is told once, and not as each dataset's.

    Raises:
        ConfigError: it cannot be opened.
    """
    import vlmeval.vlm

    if asked.config is not None:
        setattr(vlmeval.vlm, adapter.NAME, adapter.model_class())
    elif mode != "eval":
        model = adapter.model_class()(str(asked.export()), asked.precision, asked.max_new_tokens)
        run.supported_VLM[asked.called] = lambda **_: model  # use_vllm, where the name contains Qwen2-VL


def this_run(folder: Path, started: float) -> Path:
    """The status file that was begun since then, of those that are there.

    Raises:
        RuntimeError: there is none.
    """
    found = [file for file in folder.glob("*/status.json") if began(file) >= started]
    if not found:
        raise RuntimeError(f"{folder}: VLMEvalKit has left no status.json")
    return max(found, key=began)


def began(file: Path) -> float:
    return datetime.fromisoformat(json.loads(file.read_text())["created_at"]).timestamp()


def conclude(status: Path, datasets: Sequence[str], key: str, baseline: report.Scores | None) -> None:
    """Write and show the scores; end with 1 where there are failures."""
    from vlmeval.smp import collect_run_benchmark_report

    rows = {row["benchmark"]: summed_up(row) for row in collect_run_benchmark_report(status.parent)}
    found = report.outcomes(json.loads(status.read_text()), datasets, rows)
    results.keep(status.parents[1], key, report.scores(found))
    for line in report.table(found, baseline):
        sys.stdout.write(f"{line}\n")
    sys.stdout.write(f"answers and details: {status.parent}\n")
    sys.stdout.flush()
    failures = [f"{one.dataset}: {one.failure}\n" for one in found if one.failure]
    sys.stderr.writelines(failures)
    if failures:
        sys.exit(1)


def summed_up(row: Mapping[str, Any]) -> report.Row:
    """Of VLMEvalKit's summary, where the value of one primary metric stands alone."""
    name, value = row["primary_metric"], row["primary_metric_value"]
    primary = value if isinstance(value, dict) else {name: value} if name else {}
    return report.Row(row["infer_failed"] or 0, row["judge_failed"] or 0, primary)

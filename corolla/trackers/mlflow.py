"""MLflow: a run in DIR/mlruns/mlflow.db, or where MLFLOW_TRACKING_URI says.

`mlflow ui --backend-store-uri sqlite:///DIR/mlruns/mlflow.db` shows it.
"""

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

_EXPERIMENT = "corolla"
_LONGEST = 6000
"""Characters of a parameter that MLflow takes."""


class Tracker:
    """Metrics by round, parameters, tags. See corolla.trackers.Tracker."""

    def __init__(
        self, folder: Path, run_id: str, name: str, config: Mapping[str, Any], first_round: int
    ) -> None:
        home = (folder / "mlruns").resolve()
        home.mkdir(exist_ok=True)
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        where = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}"
        self.client = MlflowClient(where)
        known = self.client.get_experiment_by_name(_EXPERIMENT)
        experiment = known.experiment_id if known else self.client.create_experiment(_EXPERIMENT)
        found = self.client.search_runs([experiment], f"tags.corolla_run_id = '{run_id}'")
        if found:
            self.run = found[0].info.run_id
            self.client.update_run(self.run, status="RUNNING")
            return
        tags = {"corolla_run_id": run_id}
        self.run = self.client.create_run(experiment, tags=tags, run_name=name).info.run_id
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in config.items()}
        params = [Param(key, text[:_LONGEST]) for key, text in texts.items()]
        self.client.log_batch(self.run, params=params)

    def log(self, values: Mapping[str, float], round: int) -> None:
        now = int(1000 * time.time())
        metrics = [Metric(key, value, now, round) for key, value in values.items()]
        self.client.log_batch(self.run, metrics=metrics)

    def finish(self, outcome: Mapping[str, float], done: bool) -> None:
        self.log(outcome, 0)
        self.client.set_terminated(self.run, "FINISHED" if done else "FAILED")

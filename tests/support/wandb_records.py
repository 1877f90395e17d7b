"""What a W&B server remembers: runs, sweeps, artifacts and uploaded files."""

import json
import secrets
import threading
from dataclasses import dataclass, field
from typing import Any

import yaml

from tests.support.wandb_sweeps import Json, plan_trials

_ENDED_SWEEP_STATES = ("CANCELED", "FINISHED", "STOPPED")


@dataclass
class Run:
    """One run as its client reported it. ``wire_config`` wraps each value as W&B sends it."""

    name: str
    project: str
    display_name: str
    wire_config: Json = field(default_factory=dict)
    summary: Json = field(default_factory=dict)
    history: list[Json] = field(default_factory=list)
    events: list[Json] = field(default_factory=list)
    console: list[str] = field(default_factory=list)
    state: str = "running"
    exit_code: int | None = None
    sweep: str | None = None
    group: str | None = None
    job_type: str | None = None
    notes: str | None = None
    tags: list[str] = field(default_factory=list)

    @property
    def config(self) -> Json:
        """The values a user put into ``run.config``, without W&B's own entries."""
        return {
            name: entry["value"] for name, entry in self.wire_config.items() if name != "_wandb"
        }

    def logged(self, key: str) -> list[Any]:
        """All values of one key, in the order of logging."""
        return [row[key] for row in self.history if key in row]


@dataclass
class Sweep:
    """One sweep: its file's text, the runs started and the trials still to start."""

    name: str
    project: str
    config_text: str
    waiting: list[Json]
    state: str = "PENDING"
    controller: str | None = None
    scheduler: str | None = None
    runs: list[str] = field(default_factory=list)


@dataclass
class Artifact:
    """One artifact version; its files lie in ``Records.files`` under ``/upload/artifacts/ID``."""

    id: str
    name: str | None
    type: str | None
    digest: str | None
    state: str = "PENDING"


class Records:
    """The server's whole state; every method may be called from any request's thread."""

    def __init__(self, entity: str) -> None:
        self.entity = entity
        self.runs: dict[str, Run] = {}
        self.sweeps: dict[str, Sweep] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.files: dict[str, bytes] = {}
        self.lock = threading.RLock()
        self._sweep_of_agent: dict[str, str] = {}

    def run(self, project: str, name: str) -> Run:
        """Returns the named run, begun now if it is new."""
        with self.lock:
            return self.runs.setdefault(name, Run(name, project, display_name=name))

    def upsert_run(self, project: str, variables: Json) -> Run:
        """Begins or updates a run from the variables of ``UpsertBucket``; null changes nothing."""
        with self.lock:
            run = self.run(project, variables.get("name") or new_id())
            run.wire_config |= json.loads(variables.get("config") or "{}")
            run.summary |= json.loads(variables.get("summaryMetrics") or "{}")
            run.display_name = variables.get("displayName") or run.display_name
            run.group = variables.get("groupName") or run.group
            run.job_type = variables.get("jobType") or run.job_type
            run.notes = variables.get("notes") or run.notes
            run.sweep = variables.get("sweep") or run.sweep
            run.tags = variables.get("tags") or run.tags
            return run

    def append_stream(self, project: str, name: str, message: Json) -> None:
        """Takes one message of a run's file stream: rows at an offset, and how the run ended."""
        with self.lock:
            run = self.run(project, name)
            for file_name, chunk in (message.get("files") or {}).items():
                lines, offset = chunk.get("content", []), chunk.get("offset", 0)
                if file_name == "wandb-summary.json":
                    run.summary = json.loads(lines[-1])
                elif file_name == "wandb-history.jsonl":
                    run.history[offset : offset + len(lines)] = map(json.loads, lines)
                elif file_name == "wandb-events.jsonl":
                    run.events[offset : offset + len(lines)] = map(json.loads, lines)
                elif file_name == "output.log":
                    run.console[offset : offset + len(lines)] = lines
            if message.get("complete"):
                run.exit_code = message.get("exitcode")
                run.state = "crashed" if run.exit_code else "finished"

    def upsert_sweep(self, project: str, variables: Json) -> Sweep:
        """Creates a sweep, or changes the one that the variables name.

        Raises:
            ValueError: The sweep file cannot be planned, or the named sweep does not exist.
        """
        with self.lock:
            if name := variables.get("id"):
                return self._update_sweep(name, variables)
            config_text = variables["config"]
            waiting = plan_trials(yaml.safe_load(config_text))
            sweep = Sweep(new_id(), project, config_text, waiting)
            sweep.controller = variables.get("controller")
            sweep.scheduler = variables.get("scheduler")
            return self.sweeps.setdefault(sweep.name, sweep)

    def _update_sweep(self, name: str, variables: Json) -> Sweep:
        if name not in self.sweeps:
            raise ValueError(f"no sweep {name!r}")
        sweep = self.sweeps[name]
        sweep.state = variables.get("state") or sweep.state
        sweep.controller = variables.get("controller") or sweep.controller
        sweep.config_text = variables.get("config") or sweep.config_text
        return sweep

    def create_agent(self, sweep: str) -> str:
        """Registers an agent of a sweep and returns its id."""
        with self.lock:
            agent = new_id()
            self._sweep_of_agent[agent] = sweep
            return agent

    def agent_commands(self, agent: str, *, is_busy: bool) -> list[Json]:
        """Answers an agent's heartbeat: start the next trial, wait, or exit."""
        with self.lock:
            sweep = self.sweeps[self._sweep_of_agent[agent]]
            if not is_busy and not sweep.waiting:
                sweep.state = "FINISHED"
            if sweep.state in _ENDED_SWEEP_STATES:
                return [{"type": "exit"}]
            if is_busy:
                return []
            sweep.state = "RUNNING"
            return [self._start_trial(sweep)]

    def _start_trial(self, sweep: Sweep) -> Json:
        arguments = {name: {"value": value} for name, value in sweep.waiting.pop(0).items()}
        run = self.run(sweep.project, new_id())
        run.sweep, run.wire_config = sweep.name, dict(arguments)
        sweep.runs.append(run.name)
        return {
            "type": "run",
            "run_id": run.name,
            "run_storage_id": run.name,
            "program": yaml.safe_load(sweep.config_text).get("program"),
            "args": arguments,
        }

    def create_artifact(self, description: Json) -> Artifact:
        """Begins an artifact from the input of ``CreateArtifact``."""
        names = description.get("artifactCollectionNames") or [None]
        artifact = Artifact(
            id=new_id(),
            name=description.get("artifactCollectionName") or names[0],
            type=description.get("artifactTypeName"),
            digest=description.get("digest"),
        )
        with self.lock:
            return self.artifacts.setdefault(artifact.id, artifact)


def new_id() -> str:
    """Makes an id in the form of W&B's own: eight lower-case characters."""
    return secrets.token_hex(4)

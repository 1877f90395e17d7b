"""The GraphQL operations that wandb 0.31 sends, answered by the root fields of each query.

Every answer is a superset of what may be requested: a client reads the fields it knows.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from tests.support.wandb_records import Artifact, Records, Run, Sweep, new_id
from tests.support.wandb_sweeps import Json

_DEFAULT_PROJECT = "uncategorized"
_TOKEN = re.compile(r"[{}()]|\.\.\.|(?:(\w+)\s*:\s*)?(\w+)")


def root_fields(query: str) -> dict[str, str]:
    """Finds the outermost fields of a GraphQL operation, as ``{answer key: field}``.

    >>> root_fields("query Q($n: ID = 1) { viewer { id } info: serverInfo { project } }")
    {'viewer': 'viewer', 'info': 'serverInfo'}
    """
    fields: dict[str, str] = {}
    braces = parentheses = 0
    for token in _TOKEN.finditer(query):
        match token[0]:
            case "(" | ")":
                parentheses += 1 if token[0] == "(" else -1
            case "{" | "}" if not parentheses:
                braces += 1 if token[0] == "{" else -1
                if not braces:
                    break
            case _ if braces == 1 and not parentheses and token[2]:
                fields[token[1] or token[2]] = token[2]
    return fields


class GraphQL:
    """Answers queries from ``records``; uploads are sent to ``url``."""

    def __init__(self, records: Records, url: str) -> None:
        self.records = records
        self.url = url
        self._resolvers: dict[str, Callable[[Json], Any]] = {
            "agentHeartbeat": self._agent_heartbeat,
            "commitArtifact": self._commit_artifact,
            "createAgent": self._create_agent,
            "createArtifact": self._create_artifact,
            "createArtifactFiles": self._create_artifact_files,
            "createArtifactManifest": self._artifact_manifest,
            "createRunFiles": self._create_run_files,
            "model": self._project,
            "project": self._project,
            "serverInfo": self._server_info,
            "updateArtifactManifest": self._artifact_manifest,
            "upsertBucket": self._upsert_run,
            "upsertSweep": self._upsert_sweep,
            "useArtifact": self._use_artifact,
            "viewer": self._viewer,
        }

    def answer(self, query: str, variables: Json) -> Json:
        """Resolves every root field; one that is not known here is null."""
        # Some mutations send their arguments one level down, as ``input``.
        flat = {**variables, **(variables.get("input") or {})}
        try:
            with self.records.lock:
                data = {
                    key: self._resolvers[field](flat) if field in self._resolvers else None
                    for key, field in root_fields(query).items()
                }
        except ValueError as error:
            return {"data": None, "errors": [{"message": str(error)}]}
        return {"data": data}

    def _viewer(self, variables: Json) -> Json:
        entity = {"id": self.records.entity, "name": self.records.entity}
        return {
            "id": self.records.entity,
            "username": self.records.entity,
            "name": self.records.entity,
            "entity": self.records.entity,
            "defaultEntity": entity,
            "email": "test@localhost",
            "admin": False,
            "flags": "{}",
            "teams": {"edges": [{"node": entity}]},
            "apiKeys": {"edges": []},
        }

    def _server_info(self, variables: Json) -> Json:
        return {
            "cliVersionInfo": {"min_cli_version": "0.10.0", "max_cli_version": "9.0.0"},
            "features": [],
            "latestLocalVersionInfo": None,
            "exposesExplicitRunStatus": False,
            "isLocal": True,
        }

    def _project(self, variables: Json) -> Json:
        name = _project_name(variables)
        run_name = variables.get("run") or variables.get("runId") or variables.get("name") or ""
        sweep_name = variables.get("sweep") or variables.get("sweepName") or ""
        run = self.records.runs.get(run_name)
        sweep = self.records.sweeps.get(sweep_name)
        run_node = self._run_node(run) if run else None
        edges = self._run_edges(name, variables.get("order") or "")
        return {
            **self._project_node(name),
            "run": run_node,
            "bucket": run_node,
            "sweep": self._sweep_node(sweep) if sweep else None,
            "runs": {
                "edges": edges,
                "totalCount": len(edges),
                "pageInfo": {"endCursor": None, "hasNextPage": False},
            },
            "runCount": len(edges),
            "artifact": None,
            "artifactType": None,
            "artifactCollection": None,
        }

    def _run_edges(self, project: str, order: str) -> list[Json]:
        runs = [run for run in self.records.runs.values() if run.project == project]
        prefix, _, key = order.lstrip("+-").partition(".")
        if prefix == "summary_metrics":
            runs = [run for run in runs if key in run.summary]
            runs.sort(key=lambda run: run.summary[key], reverse=order.startswith("-"))
        return [{"node": self._run_node(run), "cursor": run.name} for run in runs]

    def _upsert_run(self, variables: Json) -> Json:
        run = self.records.upsert_run(_project_name(variables), variables)
        return {"bucket": self._run_node(run), "inserted": True}

    def _upsert_sweep(self, variables: Json) -> Json:
        sweep = self.records.upsert_sweep(_project_name(variables), variables)
        return {"sweep": self._sweep_node(sweep), "configValidationWarnings": []}

    def _create_agent(self, variables: Json) -> Json:
        return {"agent": {"id": self.records.create_agent(variables["sweep"])}}

    def _agent_heartbeat(self, variables: Json) -> Json:
        is_busy = bool(json.loads(variables.get("runState") or "{}"))
        commands = self.records.agent_commands(variables["id"], is_busy=is_busy)
        return {"agent": {"id": variables["id"]}, "commands": json.dumps(commands)}

    def _create_run_files(self, variables: Json) -> Json:
        folder = f"{self.url}/upload/{_project_name(variables)}/{variables['run']}"
        names = variables.get("files") or []
        return {
            "runID": variables["run"],
            "uploadHeaders": [],
            "files": [{"name": name, "uploadUrl": f"{folder}/{name}"} for name in names],
        }

    def _create_artifact(self, variables: Json) -> Json:
        return {"artifact": _artifact_node(self.records.create_artifact(variables))}

    def _commit_artifact(self, variables: Json) -> Json:
        artifact = self.records.artifacts[variables["artifactID"]]
        artifact.state = "COMMITTED"
        return {"artifact": _artifact_node(artifact)}

    def _use_artifact(self, variables: Json) -> Json:
        return {"artifact": {"id": variables["artifactID"]}}

    def _artifact_manifest(self, variables: Json) -> Json:
        manifest = variables.get("artifactManifestID") or new_id()
        is_uploaded = variables.get("includeUpload") is not False
        upload_url = f"{self.url}/upload/manifests/{manifest}" if is_uploaded else None
        file: Json = {
            "id": manifest,
            "name": "manifest",
            "displayName": "manifest",
            "uploadUrl": upload_url,
            "uploadHeaders": [],
        }
        return {"artifactManifest": {"id": manifest, "file": file}}

    def _create_artifact_files(self, variables: Json) -> Json:
        nodes = [
            self._artifact_file(spec["artifactID"], spec["name"])
            for spec in variables.get("artifactFiles") or []
        ]
        return {"files": {"edges": [{"node": node} for node in nodes]}}

    def _artifact_file(self, artifact_id: str, name: str) -> Json:
        storage_path = f"artifacts/{artifact_id}/{name}"
        return {
            "id": new_id(),
            "name": name,
            "displayName": name,
            "storagePath": storage_path,
            "uploadUrl": f"{self.url}/upload/{storage_path}",
            "uploadHeaders": [],
            "uploadMultipartUrls": None,
            "artifact": {"id": artifact_id},
        }

    def _project_node(self, name: str) -> Json:
        entity = {"id": self.records.entity, "name": self.records.entity}
        return {
            "id": name,
            "internalId": "1",
            "name": name,
            "entityName": self.records.entity,
            "entity": entity,
        }

    def _run_node(self, run: Run) -> Json:
        config = json.dumps(run.wire_config)
        history = [json.dumps(row) for row in run.history]
        last_step = run.history[-1].get("_step", -1) if run.history else -1
        return {
            "id": run.name,
            "storageId": run.name,
            "name": run.name,
            "displayName": run.display_name,
            "notes": run.notes,
            "group": run.group,
            "jobType": run.job_type,
            "tags": run.tags,
            "config": config,
            "wandbConfig": config,
            "summaryMetrics": json.dumps(run.summary),
            "systemMetrics": "{}",
            "sweepName": run.sweep,
            "state": run.state,
            "exitcode": run.exit_code,
            "running": run.state == "running",
            "failed": bool(run.exit_code),
            "stopped": False,
            "shouldStop": False,
            "historyLineCount": len(run.history),
            "eventsLineCount": len(run.events),
            "logLineCount": len(run.console),
            "history": history,
            "historyTail": json.dumps(history[-1:]),
            "sampledHistory": [run.history],
            "historyKeys": {"keys": {}, "lastStep": last_step, "sets": []},
            "events": [],
            "eventsTail": "[]",
            "readOnly": False,
            "user": {"name": self.records.entity, "username": self.records.entity},
            "projectId": "1",
            "project": self._project_node(run.project),
        }

    def _sweep_node(self, sweep: Sweep) -> Json:
        runs = [self._run_node(self.records.runs[name]) for name in sweep.runs]
        return {
            "id": sweep.name,
            "name": sweep.name,
            "state": sweep.state,
            "config": sweep.config_text,
            "controller": sweep.controller,
            "scheduler": sweep.scheduler,
            "earlyStopJobRunning": False,
            "bestLoss": None,
            "runs": {"edges": [{"node": node} for node in runs]},
            "runCount": len(runs),
            "runCountExpected": None,
            "priorRuns": {"edges": []},
            "project": self._project_node(sweep.project),
        }


def _project_name(variables: Json) -> str:
    name = variables.get("project") or variables.get("projectName") or variables.get("modelName")
    return name or _DEFAULT_PROJECT


def _artifact_node(artifact: Artifact) -> Json:
    return {
        "id": artifact.id,
        "state": artifact.state,
        "digest": artifact.digest,
        "artifactSequence": {
            "id": artifact.name,
            "latestArtifact": {"id": artifact.id, "versionIndex": 0},
        },
    }

"""Financial and general tasks as data: each is one YAML file, read by training and evaluation."""

from fingpt_lightning.tasks.examples import Example
from fingpt_lightning.tasks.library import find_task, task_names
from fingpt_lightning.tasks.rows import TaskRows, read_rows
from fingpt_lightning.tasks.task import Task

__all__ = ["Example", "Task", "TaskRows", "find_task", "read_rows", "task_names"]

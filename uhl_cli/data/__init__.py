"""Tasks and their examples; importing this imports neither torch nor datasets."""

from uhl_cli.data.adapter_task import evaluation_data, name_to_load
from uhl_cli.data.examples import Examples, TaskData
from uhl_cli.data.load import load_task
from uhl_cli.data.tasks import TASKS, Task

__all__ = ["TASKS", "Examples", "Task", "TaskData", "evaluation_data", "load_task", "name_to_load"]

"""Tasks and their examples; importing this imports neither torch nor datasets."""

from uhl_cli.data.examples import Examples, TaskData
from uhl_cli.data.load import load_task, local_source
from uhl_cli.data.tasks import TASKS, Task, TaskRow

__all__ = ["TASKS", "Examples", "Task", "TaskData", "TaskRow", "load_task", "local_source"]

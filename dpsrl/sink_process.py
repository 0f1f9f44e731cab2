"""One copy of the metrics, in a process of its own: Weights & Biases, or TensorBoard's event files.

Started by `dpsrl.sinks`, as a file, and needs nothing of dpsrl: JSON lines come on stdin, first the options, then
records, and each is answered with `taken` once it is written, or with `error` and why. At the end of stdin it
finishes. What libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

Write = Callable[[dict[str, Any]], None]


def open_wandb(options: dict[str, Any]) -> tuple[Write, Callable[[], None]]:
    """A run of the same id after a resume, so that its curve goes on; offline unless WANDB_MODE says otherwise."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would report home, offline too
    import wandb

    run = wandb.init(
        project=options["project"], name=options["name"], id=options["id"], resume="allow", dir=options["folder"],
        config=options["config"], mode=os.environ.get("WANDB_MODE", "offline"),
        settings=wandb.Settings(console="off", silent=True),
    )  # fmt: skip
    # wandb drops what comes at a step lower than the last, so steps are an axis of our own.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run.log, run.finish


def open_tensorboard(options: dict[str, Any]) -> tuple[Write, Callable[[], None]]:
    """Event files in the run's tensorboard folder: keys as tags, the configuration as text.

    Written as torch.utils.tensorboard does, whose import would cost seconds and a quarter of a GiB.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(os.path.join(options["folder"], "tensorboard"))

    def add(step: int, **content: Any) -> None:
        writer.add_event(Event(wall_time=time.time(), step=step, **content))

    def write(record: dict[str, Any]) -> None:
        numbers = [(tag, value) for tag, value in record.items() if tag != "step"]
        add(record["step"], summary=Summary(value=[Summary.Value(tag=t, simple_value=v) for t, v in numbers]))
        writer.flush()

    # What earlier processes wrote from this step on was taken back with the checkpoint: TensorBoard drops it.
    add(options["first_step"], session_log=SessionLog(status=SessionLog.START))
    text = "".join(f"    {line}\n" for line in json.dumps(options["config"], indent=2).splitlines())
    plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype="DT_STRING", string_val=[text.encode()], tensor_shape=shape)
    value = Summary.Value(tag="config/text_summary", metadata=plugin, tensor=tensor)
    add(options["first_step"], summary=Summary(value=[value]))
    writer.flush()
    return write, writer.close


OPEN = {"wandb": open_wandb, "tensorboard": open_tensorboard}


def read_lines(lines: queue.Queue[str | None], finish_s: float) -> None:
    """Fills the queue. After the end of stdin this process has `finish_s` left: the driver may be gone."""
    for line in sys.stdin:
        lines.put(line)
    signal.alarm(round(finish_s))
    lines.put(None)


def copy(lines: queue.Queue[str | None], answer: Callable[[str], None]) -> None:
    options = json.loads(lines.get() or "null")
    if options is None:
        return
    write, finish = OPEN[options["sink"]](options)
    answer("taken")
    while (line := lines.get()) is not None:
        write({name: value for name, value in json.loads(line).items() if value is not None})
        answer("taken")
    finish()


def main() -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=read_lines, args=(lines, float(sys.argv[1])), daemon=True).start()

    def answer(text: str) -> None:
        print(text, file=answers, flush=True)

    try:
        copy(lines, answer)
    except Exception as error:  # whatever a library raises ends the copy, and nothing else
        traceback.print_exc()
        answer(f"error {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""TensorBoard's events in job.dump_folder/tb."""

from __future__ import annotations

from collections.abc import Mapping

from titan_hd.components.trackers.tracker import SAMPLE_COLUMNS, Samples, TrackedRun, Tracker


class TensorBoardTracker(Tracker):
    title, package = "TensorBoard", "tensorboard"

    def start(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Records of later steps will be written again; that of step 0 only by a run that starts anew.
        purge = run.first_step + 1 if run.first_step else 0
        self.writer = SummaryWriter(str(run.folder / "tb"), purge_step=purge)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()  # else a run that is killed loses up to two minutes, of which a checkpoint may be

    def log_samples(self, step: int, samples: Samples) -> None:
        """A table in Markdown."""
        lines = ["|" + "|".join(SAMPLE_COLUMNS) + "|", "|---" * len(SAMPLE_COLUMNS) + "|"]
        for row in samples.rows:
            lines.append("|" + "|".join(_cell(row[column]) for column in SAMPLE_COLUMNS) + "|")
        self.writer.add_text(samples.name, "\n".join(lines), step)
        self.writer.flush()

    def finish(self, failed: bool) -> None:
        self.writer.close()


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", "<br>")

"""A task in progress."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from corolla.server.gateway.job import Job


def test_a_job_is_closed_while_reports_take_their_uploads_away(tmp_path: Path) -> None:
    closed: list[str] = []
    job = cast(Any, Job)("", None, None, None)

    @dataclass
    class Taken:
        name: str

        def close(self) -> None:
            closed.append(self.name)
            job.uploads.pop("b" if self.name == "a" else "a", None)

    job.uploads.update({name: Taken(name) for name in "abc"})
    job.close()
    assert closed == ["a", "b", "c"]
    assert not job.uploads

"""A task in progress."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from corolla.proto import device_pb2 as pb
from corolla.server.gateway import job as module
from corolla.server.gateway.job import Job
from corolla.server.gateway.leases import Lease


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


def test_a_lease_is_told_for_few_versions_of_the_log_whatever_its_phone_says_it_has() -> None:
    """Each makes a header of its own, which may have megabytes."""

    class Told:
        versions = tuple("abcdefgh")

        def header(self, log_version: str) -> tuple[pb.Blob, list[pb.Blob]]:
            return pb.Blob(content=log_version), []

    job, lease = cast(Any, Job)("", Told(), None, None), Lease("1", "p", "o", 5, 0.0)
    for version in ("", "x" * 100, *"abca", "y", "a"):  # what is no version is none
        assert job.told(lease, version)[0].content == version
    for version in "dh":
        with pytest.raises(ValueError, match="4 versions"):
            job.told(lease, version)
    assert job.told(Lease("2", "q", "o", 5, 0.0), "d")[0].content == "d"
    assert job.versions["1"] == {"", *"abc"}
    assert len(job.versions["1"]) == module._VERSIONS

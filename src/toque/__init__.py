"""Toque: durable workflows for Python on NATS JetStream and LMDB. Everything that users import is here."""

from __future__ import annotations

from toque._dead import DeadContent, DeadCount, DeadMessage, DeadResult
from toque.client import BatchResult, Client, Instance, InstanceStatus, NewInstance, StepRef, TlsFiles
from toque.errors import (
    AppError,
    BrokerUnavailable,
    DeterminismError,
    EventRefused,
    EventTimeout,
    InstanceEnded,
    InstanceErrored,
    InstanceExists,
    InstanceFailed,
    InstanceNotFound,
    InstanceTerminated,
    InvalidDuration,
    InvalidName,
    InvalidPayload,
    LostRace,
    MisuseError,
    NonRetryableError,
    NotParked,
    OwnerAway,
    PayloadTooLarge,
    QueueFull,
    ResultTimeout,
    SetupError,
    StepError,
    StepFailed,
    StepNotFound,
    StepTimeout,
    ToqueError,
    Unavailable,
    UnknownWorkflow,
    UsageError,
)
from toque.sync_client import SyncClient, SyncInstance
from toque.workflow import Approval, Retention, Retries, Step, StepContext, Workflow, WorkflowEvent

__all__ = [  # noqa: RUF022  # grouped by use, not by letter
    # writing workflows
    "Workflow",
    "WorkflowEvent",
    "Step",
    "StepContext",
    "Retries",
    "Approval",
    "Retention",
    # creating and asking
    "Client",
    "Instance",
    "SyncClient",
    "SyncInstance",
    "InstanceStatus",
    "NewInstance",
    "BatchResult",
    "StepRef",
    "TlsFiles",
    # parked messages
    "DeadMessage",
    "DeadContent",
    "DeadResult",
    "DeadCount",
    # raised by callbacks
    "NonRetryableError",
    # caught in run()
    "StepError",
    "StepFailed",
    "StepTimeout",
    "EventTimeout",
    # caught around the client
    "ToqueError",
    "UsageError",
    "InvalidName",
    "InvalidDuration",
    "InvalidPayload",
    "PayloadTooLarge",
    "AppError",
    "MisuseError",
    "LostRace",
    "InstanceExists",
    "InstanceNotFound",
    "InstanceEnded",
    "EventRefused",
    "StepNotFound",
    "NotParked",
    "Unavailable",
    "OwnerAway",
    "BrokerUnavailable",
    "ResultTimeout",
    "QueueFull",
    "UnknownWorkflow",
    "SetupError",
    "InstanceFailed",
    "InstanceErrored",
    "InstanceTerminated",
    # seen in an instance that is held
    "DeterminismError",
]

"""The models of requests, responses, and tasks' arguments and results."""

from __future__ import annotations

from pydantic import BaseModel, Field


class Order(BaseModel):
    item: str
    amount: int = Field(gt=0)
    mail: str | None = None


class Receipt(BaseModel):
    order: Order
    price: float


class Report(BaseModel):
    year: int
    sold: int


class TaskStatus(BaseModel):
    uuid: str
    task_name: str
    status: str
    attempt: int
    error: str | None = None

"""The tasks: which modality is given. Everything else about a task follows from it (JointDiT, section 3)."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One row of `TASKS`.

    `given` is the modality that is given and held at its noise level; what isn't given starts as pure noise.
    """

    name: str
    given: str | None
    prompt_needed: bool


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(name="joint_generation", given=None, prompt_needed=True),
        Task(name="depth_estimation", given="rgb", prompt_needed=False),
        Task(name="depth_to_image", given="depth", prompt_needed=True),
    )
}

"""Tasks on lung CT for any 3-D encoder: segmentation, registration, both at once, their metrics and model folders.

Reading this registry imports no torch.
"""

TASKS = {
    "segment": "lungssl_tasks.segmentation:SegmentationTask",
    "register": "lungssl_tasks.registration.network:RegistrationTask",
    "joint": "lungssl_tasks.joint.task:JointTask",
    "cosegment": "lungssl_tasks.cosegmentation.task:CosegmentationTask",
}
"""Name -> module:Class. Each class has a `Config` whose `build(encoder, ...)` makes the task; where it segments it
takes the number of classes too."""

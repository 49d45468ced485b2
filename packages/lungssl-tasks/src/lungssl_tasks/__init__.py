"""Tasks on lung CT for any 3-D encoder: segmentation, registration, their metrics and model folders.

Reading this registry imports no torch.
"""

TASKS = {
    "segment": "lungssl_tasks.segmentation:SegmentationTask",
    "register": "lungssl_tasks.registration.network:RegistrationTask",
}
"""Name -> module:Class. Each class has a `Config` whose `build(encoder, ...)` makes the task; to segment it takes the
number of classes too."""

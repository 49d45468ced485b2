"""Tasks on lung CT for any 3-D encoder: segmentation, its metrics and its model folders.

Reading this registry imports no torch.
"""

TASKS = {"segment": "lungssl_tasks.segmentation:SegmentationTask"}
"""Name -> module:Class. Each class has a `Config` whose `build(encoder, classes)` makes the task."""

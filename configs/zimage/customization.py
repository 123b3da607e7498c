"""Free-form customization at full size, the paper's second task, mixed with editing.

Pod: python -m npedit_jax.train --config configs/zimage/customization.py --workdir gs://BUCKET/customization \
    --config.data.records=/mnt/BUCKET/records/edits/NAME/1.0.0 \
    --config.data.tasks.customization.records=/mnt/BUCKET/records/edits/SUBJECTS/1.0.0
Here a reference shows a subject and the instruction asks for a new scene with it. A prefix tells the student which task
is meant (`npedit_jax.data.questions.TASK_PREFIXES`). The release lists this task as not done.
"""

from ml_collections import ConfigDict

from configs.zimage import npedit


def get_config() -> ConfigDict:
    """Returns the experiment."""
    config = npedit.get_config()
    config.data.task_prefix = True
    config.data.tasks = ConfigDict(
        dict(
            # Equal shares are our choice: the paper trains the two tasks apart.
            editing=dict(weight=0.5, records="", templates="editing"),  # "" stands for data.records
            customization=dict(weight=0.5, records="records/edits/subjects/1.0.0", templates="customization"),
        )
    )
    # Its prompts are guided like edits that change little: a strong push would cost the likeness.
    config.data.options.guidance.customization = 3.5
    return config

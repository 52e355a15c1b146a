"""Hard labels of a frozen teacher for the very images that the student sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvitfast.distill.long_tail import checked_class_map


class TeacherPipeline:
    """Resizes the student's images to the teacher's size, and takes the teacher's most likely class.

    The pixels are the student's: augmented, mixed and normalised as for the student, whatever statistics the
    teacher was trained with, as in the released code. It is no ``nn.Module``, so that ``train()``, DDP, EMA
    and optimizers of a task do not reach the teacher; the call puts it in eval mode, without gradients, under
    the autocast of the caller.

    Args:
        teacher: gives logits [B, C] in eval mode. Use a cosine classifier or PaCo through these labels only:
            the scales of their logits are of no use to soft distillation.
        size: side of the teacher's images in pixels; None leaves them as they are.
        antialias: of the bicubic resize. The released code had none (torchvision 0.15); a replication with it
            matched the paper.
        class_map: ``class_map[c]`` is the student's number of the teacher's class c, a permutation; see
            :func:`class_ranks`.
        check_finite: refuse logits that are not finite, which waits for the device once a call.

    Raises:
        ValueError: ``size`` below 1, or a class map that is not a permutation of the teacher's classes.

    Source:
        DeiT-LT (Rangwani et al., CVPR 2024), section 3.1: distillation on out-of-distribution images.

    Example:
        >>> teacher = TeacherPipeline(vf.load("resnet32.safetensors"), size=32)
        >>> labels = teacher(images)  # [B, 3, 224, 224] -> int64 [B]
    """

    def __init__(
        self,
        teacher: nn.Module,
        size: int | None = None,
        antialias: bool = True,
        class_map: Sequence[int] | Tensor | None = None,
        check_finite: bool = True,
    ) -> None:
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"TeacherPipeline: `size` must be a side in pixels or None, got {size!r}.")
        self.teacher, self.size, self.antialias, self.check_finite = teacher, size, antialias, check_finite
        self.class_map: Tensor | None = None
        if class_map is not None:
            classes = getattr(teacher, "num_classes", None) or len(class_map)
            self.class_map = checked_class_map(class_map, classes)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The teacher's labels in the student's numbers.

        Args:
            images: [B, C, H, W], as the student sees them.

        Returns:
            int64 [B]; of equal logits the first.

        Raises:
            ValueError: logits that are not [B, C] or not finite, or of another number of classes than the
                class map has.
        """
        if self.size is not None and tuple(images.shape[-2:]) != (self.size, self.size):
            # Not every backend resizes 16-bit images.
            wide = torch.promote_types(images.dtype, torch.float32)
            resized = F.interpolate(
                images.to(wide), size=(self.size, self.size), mode="bicubic", antialias=self.antialias
            )
            images = resized.to(images.dtype)
        self.teacher.eval()
        logits = self.teacher(images)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"TeacherPipeline: `teacher` must give logits [{len(images)}, C], got {got}.")
        if self.check_finite:
            bad = (~logits.isfinite()).any(1).nonzero().flatten().tolist()
            if bad:
                more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
                raise ValueError(
                    "TeacherPipeline: `teacher` must give finite logits, got NaN or infinity in rows "
                    f"{', '.join(map(str, bad[:10]))}{more} of the batch. Look at these images and at the "
                    "teacher's weights, or try it without autocast."
                )
        labels = logits.argmax(1)
        if self.class_map is None:
            return labels
        if len(self.class_map) != logits.shape[1]:
            raise ValueError(
                f"TeacherPipeline: `class_map` must have a number for each of the teacher's "
                f"{logits.shape[1]} classes, got {len(self.class_map)}."
            )
        self.class_map = self.class_map.to(labels.device)
        return self.class_map[labels]

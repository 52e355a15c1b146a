"""The teacher sees the student's pixels and stays as it is."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from pyvitfast.distill import DeiTLTLoss, PairedMixup, TeacherPipeline, class_ranks


class Fixed(nn.Module):
    """Gives the same logits whatever comes, and keeps the images."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.images = logits, None

    def forward(self, images):
        self.images = images
        return self.logits


def test_labels_are_the_first_greatest():
    teacher = Fixed(torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0], [-3.0, -2.0, -1.0]]))
    found = TeacherPipeline(teacher)(torch.zeros(3, 1, 4, 4))
    assert found.tolist() == [1, 0, 2] and found.dtype == torch.int64


@pytest.mark.parametrize("antialias", [False, True])
def test_resize_is_torchvisions(antialias):
    images = torch.randn(2, 3, 56, 56)
    teacher = Fixed(torch.zeros(2, 4))
    TeacherPipeline(teacher, size=8, antialias=antialias)(images)
    theirs = v2.functional.resize(
        images, [8, 8], interpolation=v2.InterpolationMode.BICUBIC, antialias=antialias
    )
    torch.testing.assert_close(teacher.images, theirs)
    TeacherPipeline(teacher, size=56)(images)
    assert teacher.images is images
    TeacherPipeline(teacher)(images)
    assert teacher.images is images


def test_class_map():
    ranks = class_ranks([1, 30, 20])
    teacher = Fixed(torch.eye(3))
    assert TeacherPipeline(teacher, class_map=ranks)(torch.zeros(3, 1, 4, 4)).tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match="each of the teacher's 3 classes, got 2"):
        TeacherPipeline(teacher, class_map=[1, 0])(torch.zeros(3, 1, 4, 4))
    known = timm.create_model("resnet20_cifar", num_classes=3)
    with pytest.raises(ValueError, match="each of the teacher's 3 classes"):
        TeacherPipeline(known, class_map=[1, 0])
    with pytest.raises(ValueError, match="each number must stand once"):
        TeacherPipeline(known, class_map=[1, 0, 0])


def test_rows_that_are_not_finite():
    logits = torch.zeros(4, 3)
    logits[1, 0], logits[3, 2] = torch.nan, torch.inf
    with pytest.raises(ValueError, match="NaN or infinity in rows 1, 3 of the batch"):
        TeacherPipeline(Fixed(logits))(torch.zeros(4, 1, 4, 4))
    found = TeacherPipeline(Fixed(logits), check_finite=False)(torch.zeros(4, 1, 4, 4))
    assert ((found >= 0) & (found < 3)).all()


def test_bad_calls():
    with pytest.raises(ValueError, match="`size` must be a side in pixels or None, got 0"):
        TeacherPipeline(Fixed(None), size=0)
    with pytest.raises(ValueError, match=r"must give logits \[2, C\], got \[2, 3, 4\]"):
        TeacherPipeline(Fixed(torch.zeros(2, 3, 4)))(torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"must give logits \[2, C\], got tuple"):
        TeacherPipeline(Fixed((torch.zeros(2, 3),) * 2))(torch.zeros(2, 1, 4, 4))


def test_training_the_student_leaves_the_teacher_as_it_was():
    torch.manual_seed(0)
    teacher = timm.create_model("resnet20_cifar", in_chans=1).train()
    before = copy.deepcopy(teacher.state_dict())
    student = timm.create_model("deit_micro_distilled_patch2_8").train()
    student.set_distilled_training(True)
    pipeline = TeacherPipeline(teacher, size=16)
    loss, mix = DeiTLTLoss([90, 50, 30, 20, 10, 8, 6, 4, 2, 1], drw_epoch=1), PairedMixup(mixup_alpha=0.8)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    for epoch in range(2):
        loss.set_epoch(epoch)
        teacher.train()  # as a task that trains all its modules would
        images, target = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
        if loss.mixes:
            images, target = mix(images, target)
        loss(student(images), target, pipeline(images)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    labels = pipeline(images)
    small = F.interpolate(images, size=(16, 16), mode="bicubic", antialias=True)
    assert torch.equal(labels, teacher.eval()(small).argmax(1)) and not labels.requires_grad

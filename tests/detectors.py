"""A detector and a segmentation network as people write them: YOLOv8's graph at small
widths, and a U-Net.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

N_CLASSES, BINS = 3, 4
"""Classes of the detector, and steps of each of its four distances to a box's sides."""


class ConvNormAct(nn.Module):
    """Convolution without bias, batch norm, SiLU."""

    def __init__(self, n_in: int, n_out: int, kernel: int = 1, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(n_out)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Two convolutions, with a shortcut in the backbone and without one in the neck."""

    def __init__(self, n: int, shortcut: bool):
        super().__init__()
        self.cv1, self.cv2 = ConvNormAct(n, n, 3), ConvNormAct(n, n, 3)
        self.add = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C2f(nn.Module):
    """Half of the channels pass through bottlenecks; every stage's output goes into one
    concatenation.

    The halves come from `chunk`, from `split` at a size that is written in the code
    (ultralytics has both), or from two convolutions (as in YOLOv5's C3).
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        n: int = 1,
        shortcut: bool = False,
        halve: str = "chunk",
    ):
        super().__init__()
        self.c, self.halve = n_out // 2, halve
        if halve == "two_convs":
            self.cv0, self.cv1 = ConvNormAct(n_in, self.c), ConvNormAct(n_in, self.c)
        else:
            self.cv1 = ConvNormAct(n_in, 2 * self.c)
        self.cv2 = ConvNormAct((2 + n) * self.c, n_out)
        self.m = nn.ModuleList(Bottleneck(self.c, shortcut) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        if self.halve == "two_convs":
            y = [self.cv0(x), self.cv1(x)]
        else:
            y = list(
                self.cv1(x).chunk(2, 1)
                if self.halve == "chunk"
                else self.cv1(x).split((self.c, self.c), 1)
            )
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    """Three poolings in a row, all four maps side by side."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.cv1, self.cv2 = (
            ConvNormAct(n_in, n_in // 2),
            ConvNormAct(4 * (n_in // 2), n_out),
        )
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        y1 = self.m(x)
        y2 = self.m(y1)
        return self.cv2(torch.cat((x, y1, y2, self.m(y2)), 1))


class Detect(nn.Module):
    """Boxes and classes at three scales by branches of their own; one map a scale, or
    all decoded to boxes too.

    A distance is the mean of its bins' numbers, weighted by a softmax: a convolution
    that isn't trained.
    """

    def __init__(self, widths: tuple[int, ...], decoded: bool):
        super().__init__()
        self.decoded, self.no = decoded, 4 * BINS + N_CLASSES
        n_box, n_class = max(16, widths[0] // 4), max(widths[0], N_CLASSES)
        self.cv2 = nn.ModuleList(self._branch(n, n_box, 4 * BINS) for n in widths)
        self.cv3 = nn.ModuleList(self._branch(n, n_class, N_CLASSES) for n in widths)
        self.dfl = nn.Conv2d(BINS, 1, 1, bias=False).requires_grad_(False)
        self.dfl.weight.copy_(torch.arange(float(BINS))[None, :, None, None])

    @staticmethod
    def _branch(n_in: int, n: int, n_out: int) -> nn.Sequential:
        return nn.Sequential(
            ConvNormAct(n_in, n, 3), ConvNormAct(n, n, 3), nn.Conv2d(n, n_out, 1)
        )

    def forward(self, x: list[Tensor]) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        maps = [
            torch.cat((self.cv2[i](x[i]), self.cv3[i](x[i])), 1) for i in range(len(x))
        ]
        if not self.decoded:
            return maps
        box, scores = torch.cat(
            [m.view(m.shape[0], self.no, -1) for m in maps], 2
        ).split((4 * BINS, N_CLASSES), 1)
        bins = box.view(box.shape[0], 4, BINS, -1).transpose(1, 2).softmax(1)
        distances = self.dfl(bins).view(box.shape[0], 4, -1)
        return torch.cat((distances, scores.sigmoid()), 1), maps


class Detector(nn.Module):
    """Backbone, a neck that goes top-down and bottom-up again, three heads."""

    def __init__(self, width: int = 16, halve: str = "chunk", decoded: bool = False):
        super().__init__()
        w, c2f = width, lambda *args, **kwargs: C2f(*args, halve=halve, **kwargs)
        self.stem, self.down2 = ConvNormAct(3, w, 3, 2), ConvNormAct(w, 2 * w, 3, 2)
        self.stage2, self.down3 = (
            c2f(2 * w, 2 * w, shortcut=True),
            ConvNormAct(2 * w, 4 * w, 3, 2),
        )
        self.stage3, self.down4 = (
            c2f(4 * w, 4 * w, n=2, shortcut=True),
            ConvNormAct(4 * w, 8 * w, 3, 2),
        )
        self.stage4, self.down5 = (
            c2f(8 * w, 8 * w, n=2, shortcut=True),
            ConvNormAct(8 * w, 16 * w, 3, 2),
        )
        self.stage5, self.sppf = (
            c2f(16 * w, 16 * w, shortcut=True),
            SPPF(16 * w, 16 * w),
        )
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.top4, self.top3 = c2f((16 + 8) * w, 8 * w), c2f((8 + 4) * w, 4 * w)
        self.down_a, self.bottom4 = (
            ConvNormAct(4 * w, 4 * w, 3, 2),
            c2f((4 + 8) * w, 8 * w),
        )
        self.down_b, self.bottom5 = (
            ConvNormAct(8 * w, 8 * w, 3, 2),
            c2f((8 + 16) * w, 16 * w),
        )
        self.detect = Detect((4 * w, 8 * w, 16 * w), decoded)

    def forward(self, x: Tensor):
        p3 = self.stage3(self.down3(self.stage2(self.down2(self.stem(x)))))
        p4 = self.stage4(self.down4(p3))
        p5 = self.sppf(self.stage5(self.down5(p4)))
        p4 = self.top4(torch.cat([self.upsample(p5), p4], 1))
        p3 = self.top3(torch.cat([self.upsample(p4), p3], 1))
        p4 = self.bottom4(torch.cat([self.down_a(p3), p4], 1))
        p5 = self.bottom5(torch.cat([self.down_b(p4), p5], 1))
        return self.detect([p3, p4, p5])


class DoubleConv(nn.Sequential):
    """Convolution, batch norm and ReLU, twice."""

    def __init__(self, n_in: int, n_out: int):
        layers = []
        for n in (n_in, n_out):
            layers += [
                nn.Conv2d(n, n_out, 3, padding=1, bias=False),
                nn.BatchNorm2d(n_out),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers)


class Up(nn.Module):
    """Upsampling, padded to the skip's size, beside the skip, a double convolution."""

    def __init__(self, n_in: int, n_out: int, bilinear: bool):
        super().__init__()
        self.up = nn.ConvTranspose2d(n_in, n_in // 2, 2, 2)
        if bilinear:
            self.up = nn.Sequential(
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
                nn.Conv2d(n_in, n_in // 2, 1),
            )
        self.conv = DoubleConv(n_in, n_out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        dy, dx = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
        x = F.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return self.conv(torch.cat([skip, x], 1))


class UNet(nn.Module):
    """Ronneberger et al. 2015 as it is written today: same-size convolutions, batch
    norm.
    """

    def __init__(self, width: int = 16, bilinear: bool = False, levels: int = 4):
        super().__init__()
        widths = [width * 2**i for i in range(levels + 1)]
        self.inc = DoubleConv(3, width)
        self.downs = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(2), DoubleConv(n, 2 * n)) for n in widths[:-1]
        )
        self.ups = nn.ModuleList(Up(n, n // 2, bilinear) for n in reversed(widths[1:]))
        self.outc = nn.Conv2d(width, N_CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.inc(x)]
        for down in self.downs:
            skips.append(down(skips[-1]))
        x = skips.pop()
        for up in self.ups:
            x = up(x, skips.pop())
        return self.outc(x)

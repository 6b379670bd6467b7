"""The base of regions."""

from torch import Tensor

from kd_det.context import Context


class Region:
    """
    A function of the step and of one level's maps. It holds no state, and gives no gradient.

    A region that looks at other taps than the term's names them; the term then records them too.
    """

    def student_taps(self) -> tuple[str, ...]:
        """Taps of the student that are read from ``context.student_maps``."""
        return ()

    def source_taps(self) -> tuple[str, ...]:
        """Taps of the source that are read from ``context.target_maps``."""
        return ()

    def __call__(
        self, context: Context, student: Tensor, target: Tensor, stride: int
    ) -> Tensor | None:
        """
        Weights of the cells of one level.

        Args:
            context: the step.
            student: ``(N, C, H, W)``, after its connector, on the target's grid.
            target: ``(N, C, H, W)``.
            stride: pixels per cell of that grid.

        Returns:
            ``(N, 1, H, W)`` weights >= 0 without gradient, or ``None`` where every cell counts 1.
        """
        raise NotImplementedError

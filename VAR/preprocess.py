"""What VAR makes of training images before the tokenizer sees them."""

from torch import Tensor


def enlarge(image: Tensor, shorter: int) -> Tensor:
    """uint8 [3, H, W] with its shorter side resized to `shorter` pixels, by Pillow's Lanczos filter."""
    if min(image.shape[1:]) == shorter:
        return image
    # 1.6 s after torch: only those who resize pay for it
    from torchvision.transforms.functional import InterpolationMode, pil_to_tensor, resize, to_pil_image

    return pil_to_tensor(resize(to_pil_image(image), [shorter], InterpolationMode.LANCZOS))

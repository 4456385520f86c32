"""Task vectors of two fine-tuned CLIP models of transformers, compared, added and applied.

python clip_task_vectors.py BASE FINETUNED_A FINETUNED_B OUT [ALPHA]

Each model is a folder or a repository of the Hub, such as openai/clip-vit-base-patch32,
tanganke/clip-vit-base-patch32_mnist and tanganke/clip-vit-base-patch32_svhn. The result is a
folder that transformers loads.
"""

import sys

from weightops import TaskVector, open_checkpoint

base_ref, a_ref, b_ref, out, *rest = sys.argv[1:]
alpha = float(rest[0]) if rest else 0.4

base = open_checkpoint(base_ref)
a, b = TaskVector(base, a_ref), TaskVector(base, b_ref)
print(f"norms: {a.norm():.4g} and {b.norm():.4g}, cosine {a.cosine(b):.3f}")

edited = (a + b).apply(base, alpha=alpha)
edited.save(out)
print(f"{out}: {base_ref} + {alpha:g} * ({a_ref} + {b_ref})")

"""How a prediction is explained: rules, encoders, the batched backward pass, LRP-inference.

Imports captioning.data (images) and the modules of captioning. The models import it; it never
imports a model."""

"""How a prediction is explained: rules, encoders under a rule, the batched backward pass, LRP-inference.

Imports only the modules of captioning (errors, weights). The models import it; it never imports a model."""

"""How the embedded model was made, part by part, and how good it is.

Every part is a module with `make(runs, minutes=None)`, resumes where it was stopped, and is run by its name.
"""

PARTS = {
    "artwork": "fetch the icon packs, render pictures and masks, check them against the frozen manifest",
    "autoencoder": "train 128 px <-> 16 x 16 x 8 latents",
    "text": "train the text encoder by distilling a sentence encoder",
    "teacher": "train the denoiser on cached latents and text states",
    "decoder": "go on with the autoencoder's decoder alone",
    "assemble": "put the trained parts into assets/emoji-sd",
    "restore": "take assets/emoji-sd apart again, to go on training where there are no runs",
    "prompts": "freeze the prompts that methods are measured on",
    "scorer": "train the two scorers that judge pictures against captions",
    "measure": "write every figure the README gives of the model",
}

"""The evaluation of forms: into memory, into files and to numbers, in bounded memory."""

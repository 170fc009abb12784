"""What an importance pass costs: Fisher and MAS over whole models, next to what people run today."""

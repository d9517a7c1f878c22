"""How good an encoder or a head is: splits by case, metrics, intervals."""

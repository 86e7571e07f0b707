/* What the broker provides to the plugins, for fuzz targets that run without it. */
#include "../version.h"

void mosquitto_log_printf(int level, const char *format, ...)
{
	(void)level;
	(void)format;
}

const char *mosquitto_persistence_location(void)
{
	return "/nonexistent";
}

#include "plugin.h"

#include <stdlib.h>
#include <string.h>

#include "version.h"

MOSQUITTO_PLUGIN_DECLARE_VERSION(5);

bool plugin_keep_option(char **target, const char *value)
{
	if(*target){
		return false;
	}
	*target = strdup(value);
	return *target != NULL;
}

static bool configure(void *state, const struct mosquitto_opt *options, int option_count)
{
	for(int i = 0; i < option_count; i++){
		if(!PLUGIN.set_option(state, options[i].key, options[i].value)){
			mosquitto_log_printf(MOSQ_LOG_ERR, "%s: plugin_opt_%s is not known, is given twice, or has no valid value: %s", PLUGIN.name,
				options[i].key, options[i].value);
			return false;
		}
	}
	if(!PLUGIN.is_complete(state)){
		mosquitto_log_printf(MOSQ_LOG_ERR, "%s: expected %s", PLUGIN.name, PLUGIN.expected);
		return false;
	}
	return true;
}

int mosquitto_plugin_init(mosquitto_plugin_id_t *identifier, void **userdata, struct mosquitto_opt *options, int option_count)
{
	void *state = calloc(1, PLUGIN.state_bytes);
	int rc = MOSQ_ERR_SUCCESS;

	if(!state){
		return MOSQ_ERR_NOMEM;
	}
	/* Mosquitto calls mosquitto_plugin_cleanup() with it, also after an error. */
	*userdata = state;
	mosquitto_plugin_set_info(identifier, PLUGIN.name, NULL);
	if(!configure(state, options, option_count) || !PLUGIN.start(state)){
		return MOSQ_ERR_INVAL;
	}
	for(int i = 0; rc == MOSQ_ERR_SUCCESS && i < MAX_CALLBACKS && PLUGIN.callbacks[i].function; i++){
		rc = mosquitto_callback_register(identifier, PLUGIN.callbacks[i].event, PLUGIN.callbacks[i].function, NULL, state);
	}
	return rc;
}

/* Mosquitto itself removes the callbacks of a plugin that it unloads. */
int mosquitto_plugin_cleanup(void *userdata, struct mosquitto_opt *options, int option_count)
{
	(void)options;
	(void)option_count;
	if(userdata){
		PLUGIN.clear(userdata);
		free(userdata);
	}
	return MOSQ_ERR_SUCCESS;
}

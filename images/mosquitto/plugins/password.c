#include "password.h"

#include <stddef.h>

#include "version.h"

void *password_parse(const char *text)
{
	struct mosquitto_pw *password = NULL;

	if(mosquitto_pw_new(&password, MOSQ_PW_DEFAULT) != MOSQ_ERR_SUCCESS || mosquitto_pw_decode(password, text) != MOSQ_ERR_SUCCESS){
		mosquitto_pw_cleanup(password);
		return NULL;
	}
	return password;
}

void password_free(void *password)
{
	mosquitto_pw_cleanup(password);
}

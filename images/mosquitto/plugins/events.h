/* Callbacks through which Mosquitto reports the changes of its queues. The user data of each is a `struct queues`. */
#ifndef FLEETWRIGHT_EVENTS_H
#define FLEETWRIGHT_EVENTS_H

/* The direction of a message that a client sends; the others (1) go to one. */
#define DIRECTION_IN 0

int on_message_stored(int event, void *event_data, void *userdata);
int on_message_queued(int event, void *event_data, void *userdata);
int on_message_dequeued(int event, void *event_data, void *userdata);
int on_disconnect(int event, void *event_data, void *userdata);
int on_session_end(int event, void *event_data, void *userdata);
int on_subscribed(int event, void *event_data, void *userdata);
int on_unsubscribed(int event, void *event_data, void *userdata);

#endif
